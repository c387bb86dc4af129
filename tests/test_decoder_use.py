"""Test padding, adapters, the KV cache and bfloat16 in every family, against torch where possible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_pairs import EACH_FAMILY, LENGTH, SHORT, TOLERANCE, pair_fixture, random_tokens, run, torch_logits
from full_set import full_except
from tiny_bases import random_adapter, write_llama
from tiny_models import torch

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import init_cache, load_model, stack_adapter, step
from jcrosslora.errors import UsageError

pair = pair_fixture(full_except(EACH_FAMILY, ["llama", "gemma3"]))


@pytest.mark.parametrize("side", full_except(["left", "right"], ["left"]))
def test_padding_on_either_side_does_not_change_logits(pair, side):
    model, _, ours = pair
    tokens, lengths = random_tokens(3, LENGTH), (LENGTH, 33, 18)
    mask = np.zeros(tokens.shape, bool)
    for row, count in enumerate(lengths):
        mask[row, LENGTH - count :] = True
    mask = mask if side == "left" else mask[:, ::-1]
    padded = np.where(mask, tokens, 0).astype(np.int32)
    found = run(ours, padded, mask)
    assert np.all(np.isfinite(found))
    for row, seen in enumerate(mask):  # one by one: in a batch of transformers, the longest text switches longrope
        theirs = torch_logits(model, tokens[row][seen][None])
        np.testing.assert_allclose(np.asarray(found)[row][seen], theirs[0], **TOLERANCE)


def test_unmerged_adapter_matches_the_merged_model(pair):
    model, base, ours = pair
    adapter, tokens = random_adapter(base, rank=3, scale=0.02), random_tokens(2, LENGTH)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = {name: tensor.clone() for name, tensor in state.items()}
    for name, factors in adapter.modules.items():
        module = base.modules[name]
        rows = slice(*module.rows) if module.rows else slice(None)
        merged[module.tensor][rows] += torch.from_numpy(factors.scale * factors.b @ factors.a)
    model.load_state_dict(merged)
    theirs = torch_logits(model, tokens)
    model.load_state_dict(state)
    assert np.abs(theirs - torch_logits(model, tokens)).max() > 0.1
    found = run(ours, tokens, None, stack_adapter(adapter, base))
    np.testing.assert_allclose(found, theirs, **TOLERANCE)


def test_cached_steps_match_one_pass_over_the_sequence(pair):
    _, base, ours = pair
    adapter = stack_adapter(random_adapter(base, rank=2, scale=0.02), base)
    # Cached keys of longrope use the short factors, so the sequence must not exceed the original length.
    tokens = random_tokens(2, LENGTH if ours.settings.ropes[0].switch is None else SHORT)
    wanted = run(ours, tokens, None, adapter)
    one = jax.jit(step)
    cache = init_cache(ours.settings, 2, tokens.shape[1])
    for place in range(tokens.shape[1]):
        scores, cache = one(ours.with_adapter(adapter), cache, tokens[:, place], jnp.full((2,), place, jnp.int32))
        np.testing.assert_allclose(scores, wanted[:, place], **TOLERANCE)


@pytest.mark.parametrize("pair", full_except(["qwen2-window", "gemma3"], ["gemma3"]), indirect=True)
def test_bfloat16_logits_are_close_to_float32(pair):
    _, base, ours = pair
    half = load_model(base, jnp.bfloat16, packed=False)
    assert {array.dtype for array in half.params.weights.values()} == {jnp.dtype(jnp.bfloat16)}
    tokens = random_tokens(2, SHORT)
    exact, found = run(ours, tokens), run(half, tokens)
    error = relative(found, exact)
    assert 0 < error < 0.1
    # With packed weights, only the weights and the inputs of their products are rounded.
    bits = load_model(base, jnp.bfloat16, packed=True)
    for role, array in bits.params.weights.items():
        assert array.dtype == jnp.uint16
        np.testing.assert_array_equal(array, np.asarray(half.params.weights[role]).view(np.uint16))
    assert 0 < relative(run(bits, tokens), exact) < error


@pytest.mark.parametrize("pair", full_except(["qwen2-window", "gemma3", "phi3-longrope"], []), indirect=True)
def test_adapter_gradient_through_packed_weights_is_close_to_float32(pair):
    _, base, ours = pair
    tokens, adapter = random_tokens(2, SHORT), stack_adapter(random_adapter(base, rank=3, scale=0.05), base)

    @jax.jit
    def gradient(ours, adapter):
        def loss(adapter):
            return jnp.mean(jax.nn.logsumexp(run(ours, tokens, None, adapter), axis=-1))

        return jax.grad(loss)(adapter)

    exact, found = gradient(ours, adapter), gradient(load_model(base, jnp.bfloat16, packed=True), adapter)
    for wanted, near in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True):
        assert 0 < relative(near, wanted) < 0.1


def test_cached_steps_with_packed_weights_match_one_pass(tmp_path):
    base = open_base(write_llama(tmp_path))
    ours = load_model(base, jnp.bfloat16, packed=True)
    tokens = random_tokens(2, 6)
    wanted = run(ours, tokens)
    cache = init_cache(ours.settings, 2, 6, ours.params.stream_dtype)
    assert cache.states["attention"].keys.dtype == jnp.float32
    for place in range(6):
        scores, cache = step(ours, cache, tokens[:, place], jnp.full((2,), place, jnp.int32))
        # Sums in another order can round to another bfloat16 number.
        assert relative(scores, wanted[:, place]) < 5e-3


def test_packing_float32_is_refused(tmp_path):
    with pytest.raises(UsageError, match="float32 weights cannot be packed"):
        load_model(open_base(write_llama(tmp_path)), packed=True)


def relative(found, wanted):
    return float(jnp.sqrt(jnp.mean((found - wanted) ** 2) / jnp.mean(wanted**2)))
