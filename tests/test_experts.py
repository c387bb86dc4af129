"""Models with experts: their products, their gradients, and adapters of all their linear modules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_models import dense_model
from full_set import full_except
from tiny_models import torch

import jcrosslora as jcl
from jcrosslora.architectures.blocks.grouped import mix, run_experts, sort_by_expert, spread
from jcrosslora.architectures.ops import Row
from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import forward, load_model, logits, stack_adapter, unstack_adapter

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 11)).astype(np.int32)
E, K, T, H = 5, 2, 37, 6


def single(rows, held, factors):
    return rows @ held["w"].T + (rows @ factors["a"].T) @ factors["b"].T


@pytest.fixture(scope="module")
def rows():
    keys = jax.random.split(jax.random.key(0), 5)
    x, w = jax.random.normal(keys[0], (T, H)), jax.random.normal(keys[1], (3, E, H, H))
    factors = {"a": jax.random.normal(keys[2], (E, 2, H)), "b": jax.random.normal(keys[3], (E, H, 2))}
    # Expert 3 has no tokens, and expert 0 more than one block of them.
    chosen = jnp.stack([jnp.zeros(T, jnp.int32), jnp.asarray([1, 2, 4] * T)[:T].astype(jnp.int32)], axis=1)
    return x, w, factors, chosen


def grouped(x, chosen, held, factors, shares, scales):
    order = sort_by_expert(chosen, E)
    return mix(run_experts(single, spread(x, order, scales), order, held, factors), shares, order)


def by_hand(x, w, factors, chosen, shares, scales):
    whole = w + jnp.einsum("eok,eki->eoi", factors["b"], factors["a"])
    return jnp.einsum("tkoi,ti,tk,tk->to", whole[chosen], x, shares, scales)


def test_grouped_products_and_their_gradients_are_those_of_each_token_alone(rows):
    x, w, factors, chosen = rows
    shares, scales = jax.random.uniform(jax.random.key(7), (2, T, K))
    pull = jax.random.normal(jax.random.key(9), (T, H))
    with jax.default_matmul_precision("highest"):
        found, found_pull = jax.vjp(
            lambda x, *given: grouped(x, chosen, {"w": Row(w, jnp.int32(1))}, *given), x, factors, shares, scales
        )
        wanted, wanted_pull = jax.vjp(
            lambda x, factors, *given: by_hand(x, w[1], factors, chosen, *given), x, factors, shares, scales
        )
        jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), found, wanted)
        jax.tree.map(partial(np.testing.assert_allclose, **CLOSE), found_pull(pull), wanted_pull(pull))


@pytest.mark.full
def test_grouped_products_can_be_mapped_over_adapters_and_their_own_choice_of_experts(rows):
    x, w, factors, chosen = rows
    several = jax.tree.map(lambda one: jnp.stack([one, 2 * one]), factors)
    choices, ones = jnp.stack([chosen, chosen[::-1] % E]), jnp.ones((T, K))

    def run(factors, chosen):
        return grouped(x, chosen, {"w": w[0]}, factors, ones, None)

    found = jax.vmap(run)(several, choices)
    for place in range(2):
        own = jax.tree.map(lambda one, place=place: one[place], several)
        np.testing.assert_allclose(found[place], by_hand(x, w[0], own, choices[place], ones, ones), **CLOSE)


@pytest.fixture(
    scope="module",
    params=full_except(["qwen3_moe-mixed", "glm4_moe", "qwen2_moe", "deepseek_v3"], ["qwen2_moe"]),
)
def model(request, tmp_path_factory):
    """A model in torch with dense layers in it, and its base."""
    folder = tmp_path_factory.mktemp(request.param)
    torch_model = dense_model(request.param)
    torch_model.save_pretrained(folder)
    return torch_model, open_base(folder)


def random_adapter(base):
    rng = np.random.default_rng(1)
    return jcl.Adapter(
        modules={
            name: jcl.LoRAFactors(
                a=rng.normal(size=(2, module.shape[1])).astype(np.float32),
                b=0.1 * rng.normal(size=(module.shape[0], 2)).astype(np.float32),
            )
            for name, module in base.modules.items()
        }
    )


def test_an_adapter_of_all_linear_modules_does_what_its_merged_weights_do(model):
    torch_model, base = model
    adapter = random_adapter(base)
    plain = {name: array.clone() for name, array in torch_model.state_dict().items()}
    merged = {name: array.clone() for name, array in plain.items()}
    for name, factors in adapter.modules.items():
        merged[base.modules[name].tensor] += torch.from_numpy(factors.b @ factors.a)
    torch_model.load_state_dict(merged)
    with torch.no_grad():
        wanted = torch_model(input_ids=torch.from_numpy(TOKENS).long(), use_cache=False).logits.numpy()
    torch_model.load_state_dict(plain)
    ours, stacked = load_model(base), stack_adapter(adapter, base)
    run = jax.jit(lambda stacked: logits(ours, forward(ours.with_adapter(stacked), TOKENS).hidden))
    np.testing.assert_allclose(run(stacked), wanted, **CLOSE)
    back = unstack_adapter(stacked, base)
    assert set(back.modules) == set(base.modules)


@pytest.mark.full
def test_what_experts_return_is_not_computed_again_for_gradients_unless_layers_are(model):
    base = model[1]
    ours, adapter = load_model(base), stack_adapter(random_adapter(base), base)

    def loss(adapter, remat):
        return jnp.sum(forward(ours.with_adapter(adapter), TOKENS, remat=remat).hidden)

    kept, again = (str(jax.make_jaxpr(jax.grad(partial(loss, remat=remat)))(adapter)) for remat in (False, True))
    assert kept.count("while[") < again.count("while[")  # the loops over experts


def test_weights_in_memory_have_the_names_of_fused_experts(model):
    torch_model, base = model
    live = open_base(torch_model)
    assert any(name.endswith("experts.gate_up_proj") for name in live.store.names())
    assert not any(name.endswith("experts.gate_up_proj") for name in base.store.names())
    jax.tree.map(np.testing.assert_array_equal, load_model(live), load_model(base))
