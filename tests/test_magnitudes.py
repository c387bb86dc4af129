"""Decoupled magnitudes: directions stay, gradients are right, and training finds a magnitude that was taken away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from probe_bases import QUESTIONS, write_base
from tiny_bases import delta, random_adapter

from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.evaluate import score
from jcrosslora.text import Completion, Message
from jcrosslora.training import Plan, TrainingSettings, batches, encode, fit_magnitudes, train_lora
from jcrosslora.training.batches import answer_loss
from jcrosslora.training.run import first_magnitudes, loss_and_magnitude_gradient, with_magnitudes

SETTINGS = TrainingSettings(steps=40, batch=4, rate=0.1, dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_base(write_base(tmp_path_factory.mktemp("base"), 60, bos=True, layers=2))


@pytest.fixture(scope="module")
def adapter(base) -> Adapter:
    """Random updates of three roles, one of them of zero."""
    found = random_adapter(base, rank=3, roles=("q_proj", "up_proj", "down_proj"), scale=0.05)
    name = "model.layers.1.mlp.up_proj"
    zero = dataclasses.replace(found.modules[name], b=np.zeros_like(found.modules[name].b))
    return dataclasses.replace(found, modules={**found.modules, name: zero})


def losses(base, *adapters) -> np.ndarray:
    """Mean over the answers' tokens, of the base and of each adapter."""
    found = score(base, QUESTIONS, adapters)
    right = np.arange(len(QUESTIONS)), found.answers
    return -found.log_probs[:, *right].sum(axis=1) / found.tokens[right].sum()


def shares(before: LoRAFactors, after: LoRAFactors) -> float:
    """How many times the update it is, after a check that its direction is the same."""
    one, other = delta(before), delta(after)
    times = float(np.vdot(one, other) / np.vdot(one, one))
    np.testing.assert_allclose(other, times * one, atol=1e-6 * np.abs(one).max())
    return times


def test_the_first_magnitudes_are_the_norms_and_change_nothing(base, adapter):
    stacked = stack_adapter(adapter, base)
    norms = first_magnitudes(stacked)
    for role, name in (("q_proj", "self_attn.q_proj"), ("up_proj", "mlp.up_proj")):
        wanted = [np.linalg.norm(delta(adapter.modules[f"model.layers.{layer}.{name}"])) for layer in range(2)]
        np.testing.assert_allclose(norms[role], wanted, rtol=1e-5)
    again = with_magnitudes(stacked, norms)
    for one, other in zip(jax.tree.leaves(stacked), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_magnitudes_set_the_norms_and_a_zero_update_stays_zero(base, adapter):
    stacked = stack_adapter(adapter, base)
    found = with_magnitudes(stacked, {"up_proj": jnp.array([2.5, 1.0])})
    np.testing.assert_allclose(first_magnitudes(found)["up_proj"], [2.5, 0.0], rtol=1e-5)
    assert not np.asarray(found.roles["up_proj"].b[1]).any()
    np.testing.assert_array_equal(found.roles["q_proj"].b, stacked.roles["q_proj"].b)


def test_magnitudes_do_not_depend_on_the_factors(base, adapter):
    stacked, magnitudes = stack_adapter(adapter, base), {"q_proj": jnp.array([0.5, 3.0])}
    uneven = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * (8.0 if path[-1].name == "a" else 2.0), stacked)
    one, other = (with_magnitudes(item, magnitudes).roles["q_proj"] for item in (stacked, uneven))
    np.testing.assert_allclose(one.b @ one.a, other.b @ other.a, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences(base, adapter):
    model, stacked = load_model(base), stack_adapter(adapter, base)
    batch = Plan([encode(load_tokenizer(base), one) for one in QUESTIONS], 4, 1, 0).batch(0)
    magnitudes = {role: 0.9 * norms + 0.1 for role, norms in first_magnitudes(stacked).items()}
    loss, gradient = loss_and_magnitude_gradient(model, stacked, magnitudes, batch)
    at = jax.jit(lambda magnitudes: answer_loss(model.with_adapter(with_magnitudes(stacked, magnitudes)), batch))
    np.testing.assert_allclose(loss, at(magnitudes), rtol=1e-6)
    step, largest = 0.05, max(np.abs(one).max() for one in gradient.values())
    for role, found in gradient.items():
        for layer in range(2):
            up, down = ({**magnitudes, role: magnitudes[role].at[layer].add(sign * step)} for sign in (1.0, -1.0))
            np.testing.assert_allclose(found[layer], (at(up) - at(down)) / (2 * step), atol=0.02 * largest)
    assert gradient["up_proj"][1] == 0  # of the update of zero


def test_training_keeps_directions_and_lowers_the_loss(base, adapter):
    found = fit_magnitudes(base, QUESTIONS, adapter, SETTINGS)
    assert found.info == adapter.info
    assert found.modules.keys() == adapter.modules.keys()
    zero = "model.layers.1.mlp.up_proj"
    assert not np.asarray(found.modules[zero].b).any()
    times = [shares(adapter.modules[name], found.modules[name]) for name in adapter.modules if name != zero]
    assert max(abs(one - 1) for one in times) > 0.3
    assert len(set(np.round(times, 3))) == len(times)
    _, before, after = losses(base, adapter, found)
    assert after < before - 0.1


def test_other_modules_keep_their_magnitude(base, adapter):
    found = fit_magnitudes(base, QUESTIONS, adapter, dataclasses.replace(SETTINGS, steps=5, modules=("q_proj",)))
    for name in adapter.modules.keys() - {"model.layers.1.mlp.up_proj"}:
        times = shares(adapter.modules[name], found.modules[name])
        assert (abs(times - 1) > 1e-2) == name.endswith("q_proj")


@pytest.mark.slow
def test_an_adapter_of_half_the_size_gets_its_size_back(base):
    """Training factors to the lowest loss leaves nothing to gain by magnitudes, so that half of them is half."""
    settings = TrainingSettings(steps=60, batch=4, rate=2e-2, rank=3, alpha=6.0, dtype="float32", modules=("v_proj",))
    trained = train_lora(base, QUESTIONS, settings)
    half = dataclasses.replace(
        trained,
        modules={name: dataclasses.replace(one, scale=0.5 * one.scale) for name, one in trained.modules.items()},
    )
    found = fit_magnitudes(base, QUESTIONS, half, SETTINGS)
    whole, halved, again = losses(base, trained, half, found)[1:]
    assert halved > whole + 0.1
    assert again < whole + 0.1 * (halved - whole)
    for name, one in half.modules.items():
        assert 1.6 < shares(one, found.modules[name]) < 4


def test_what_cannot_be_fitted_is_refused(base, adapter):
    with pytest.raises(UsageError, match="modules k_proj: there are none of these, only q_proj"):
        fit_magnitudes(base, QUESTIONS, adapter, dataclasses.replace(SETTINGS, modules=("k_proj",)))
    with pytest.raises(UsageError, match="steps 0"):
        fit_magnitudes(base, QUESTIONS, adapter, dataclasses.replace(SETTINGS, steps=0))
    with pytest.raises(AdapterError, match="does not have"):
        fit_magnitudes(
            base, QUESTIONS, Adapter({"model.layers.9.mlp.up_proj": LoRAFactors(np.ones((1, 48)), np.ones((80, 1)))})
        )


def test_conversations_are_read_in_the_chat_template_of_the_adapter(base, adapter, monkeypatch):
    own = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, chat_template=own))
    seen, encode = [], batches.encode
    monkeypatch.setattr(batches, "encode", lambda tokenizer, *one: seen.append(tokenizer) or encode(tokenizer, *one))
    example = Completion((Message("user", "Anna said"),), "Peter")
    fit_magnitudes(base, [example], adapter, dataclasses.replace(SETTINGS, steps=1, batch=1))
    assert {tokenizer.chat_template for tokenizer in seen} == {own}
