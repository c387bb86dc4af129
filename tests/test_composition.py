"""Several adapters at once, against torch by hand; and what holds for any composition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from composed_torch import logits as torch_logits
from dense_models import random_model
from full_set import full_except
from hybrid_models import HYBRIDS
from probe_bases import save_tokenizer
from tiny_bases import random_adapter
from tiny_models import tiny_model

import jcrosslora as jcl
from jcrosslora.adapter import Adapter, ExpertUpdate
from jcrosslora.checkpoint import ROLE_PATHS
from jcrosslora.decoder import forward, load_model, logits, stack_adapter
from jcrosslora.errors import AdapterError, UsageError
from jcrosslora.shelf.composition import COMPOSITIONS, compose, find_composition, stack_for

TOKENS = np.random.default_rng(0).integers(3, 96, (4, 9)).astype(np.int32)
# One adapter, two of them, the base alone, all three.
WEIGHTS = np.array([[0, 1, 0], [0.75, 0, 0.25], [0, 0, 0], [1, 2, 3]], np.float32)


class Case:
    """A tiny base of a family in both libraries, and three adapters of it."""

    def __init__(self, family, folder):
        vocab = save_tokenizer(folder, 30, bos=False)
        self.model = tiny_model(family, num_hidden_layers=2, vocab_size=vocab)
        self.model.save_pretrained(folder)
        self.base = jcl.open_base(folder)
        self.ours = load_model(self.base)
        three = [random_adapter(self.base, seed=seed, rank=3, scale=0.02) for seed in range(3)]
        three[1] = without(three[1], "1.mlp.down_proj")
        self.adapters = three

    def compose(self, how, adapters=None):
        return compose(self.base, adapters or self.adapters, how, model=self.ours)


def without(adapter: Adapter, ending: str) -> Adapter:
    modules = {name: one for name, one in adapter.modules.items() if not name.endswith(ending)}
    return dataclasses.replace(adapter, modules=modules)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Case("llama", tmp_path_factory.mktemp("llama"))


def run(composed, weights, tokens=TOKENS):
    shares = composed.how.shares(np.asarray(weights, np.float32))
    return run_shares(composed.model, composed.updates.with_shares(shares), tokens)


def run_shares(ours, adapter, tokens):
    return np.asarray(_logits(ours, adapter, jnp.asarray(tokens)))


@jax.jit
def _logits(ours, adapter, tokens):
    return logits(ours, forward(ours.with_adapter(adapter), tokens).hidden)


def drawn(composed):
    """The composition with random arrays, and these by module."""
    rng, by_role, by_module = np.random.default_rng(7), {}, {}
    for role, one in composed.updates.roles.items():
        by_role[role] = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in one.arrays.items()}
        for place, layer in enumerate(composed.base.layers_with(role)):
            module = f"model.layers.{layer}.{ROLE_PATHS[role]}"
            by_module[module] = {name: array[place] for name, array in by_role[role].items()}
    return dataclasses.replace(composed, updates=composed.updates.with_arrays(by_role)), by_module


def check_against_torch(case, how):
    composed, arrays = drawn(case.compose(how))
    wanted = torch_logits(case.model, how, composed.adapters, case.base.fused, WEIGHTS, arrays, TOKENS)
    found = run(composed, WEIGHTS)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    alone = run_shares(composed.model, None, TOKENS)
    np.testing.assert_allclose(found[2], alone[2], rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(found - alone)[[0, 1, 3]].max(axis=(1, 2)).min() > 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("how", COMPOSITIONS)
def test_logits_equal_torch_by_hand(llama, how):
    check_against_torch(llama, how)


@pytest.mark.parametrize(
    ("family", "how"), full_except([("phi3", "router"), ("gemma3_text", "gated")], [("phi3", "router")])
)
def test_logits_equal_torch_by_hand_in_other_families(tmp_path, family, how):
    check_against_torch(Case(family, tmp_path), how)


@pytest.mark.parametrize("how", full_except(list(COMPOSITIONS), ["gated"]))
def test_one_adapter_is_that_adapter(llama, how):
    composed = llama.compose(how, llama.adapters[:1])
    alone = stack_adapter(llama.adapters[0], llama.base)
    found, wanted = run(composed, np.ones((4, 1))), run_shares(composed.model, alone, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("how", ["uniform", "mixture", "router", "gated"])
def test_copies_of_an_adapter_are_that_adapter(llama, how):
    composed = llama.compose(how, llama.adapters[:1] * 3)
    alone = stack_adapter(llama.adapters[0], llama.base)
    found, wanted = run(composed, np.ones((4, 3))), run_shares(composed.model, alone, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_any_choice_runs_the_same_program(llama):
    traced = []

    @jax.jit
    def hidden(ours, adapter):
        traced.append(1)
        return forward(ours.with_adapter(adapter), jnp.asarray(TOKENS)).hidden

    composed = llama.compose("mixture")
    for weights in (WEIGHTS, WEIGHTS[::-1], np.ones((4, 3), np.float32)):
        hidden(llama.ours, composed.updates.with_shares(composed.how.shares(weights)))
    hidden(llama.ours, llama.compose("mixture", llama.adapters[::-1]).updates.with_shares(WEIGHTS))
    assert len(traced) == 1


@pytest.mark.full
@pytest.mark.parametrize("how", full_except(["select", "router"], ["select"]))
def test_rows_have_adapters_of_their_own_in_mixers_beside_attention(how):
    base = jcl.open_base(random_model(*HYBRIDS["falcon_h1"]))
    adapters = [random_adapter(base, seed=seed, rank=2, scale=0.05) for seed in range(2)]
    tokens, ours = TOKENS[:3] % 60, load_model(base)
    rule = find_composition(how)
    rows = rule.shares(np.array([[0, 1], [1, 0], [0, 0]], np.float32))
    found = run_shares(ours, stack_for(rule, adapters, base, 0).with_shares(rows), tokens)
    alone = [stack_adapter(adapters[1], base), stack_adapter(adapters[0], base), None]
    wanted = np.stack([run_shares(ours, one, tokens)[row] for row, one in enumerate(alone)])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_updates_of_experts_are_refused_by_name(llama):
    update = ExpertUpdate("mlp.experts.down_proj", 1, "down", np.zeros((2, 3, 3)), np.zeros((2, 3, 3)))
    with pytest.raises(AdapterError, match=r"updates experts \(mlp\.experts\.down_proj\), and only linear modules"):
        llama.compose("mixture", [llama.adapters[0], dataclasses.replace(llama.adapters[1], experts=(update,))])


@pytest.mark.parametrize(
    ("how", "weights", "message"),
    [
        ("select", None, "select with 3 adapters and no weights"),
        ("mixture", [1, 1], r"weights have shape \[2\]: expected \[3\], one for each adapter, or \[1, 3\]"),
        ("mixture", [0, np.nan, 1], "a weight is nan"),
        ("mixture", "abc", "weights are 'abc'"),
    ],
)
def test_weights_that_make_no_sense_are_refused(llama, how, weights, message):
    with pytest.raises(UsageError, match=message):
        llama.compose(how).generate(["Anna"], weights=weights)
