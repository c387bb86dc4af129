"""Streamed cross-moments against float64 sums over captured activations."""

from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_bases import open_pair, write_llama

import jcrosslora as jcl
from jcrosslora.architectures import DENSE_ROLES
from jcrosslora.decoder import INPUT_SITES, forward, load_model
from jcrosslora.maps.activations import add_rows, cross_moments, zero_moments
from jcrosslora.maps.base_pair import BasePair

WIDER = {"hidden": 56, "heads": 2, "kv_heads": 1, "head_dim": 40, "intermediate": 72, "layers": 2, "vocab": 90}
LAYERS = (2, 0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return open_pair(tmp_path_factory.mktemp("bases"), **WIDER)


def batch(seed):
    """Three texts of both bases, the last one padded, with twelve matches of which two are not valid."""
    rng = np.random.default_rng(seed)
    mask = np.ones((3, 10), bool)
    mask[2, 7:] = False
    return SimpleNamespace(
        tokens_src=rng.integers(0, 90, (3, 10)).astype(np.int32),
        mask_src=mask,
        tokens_tgt=rng.integers(0, 90, (3, 10)).astype(np.int32),
        mask_tgt=mask,
        at_src=rng.integers(1, 26, 12).astype(np.int32),
        at_tgt=rng.integers(1, 26, 12).astype(np.int32),
        valid=np.arange(12) < 10,
    )


def captured(base, tokens, mask):
    names = frozenset({"inputs", "outputs"})
    run = jax.jit(forward, static_argnames="capture")
    seen = run(load_model(base), jnp.asarray(tokens), mask=jnp.asarray(mask), capture=names)
    return seen.captured["inputs"], seen.captured["outputs"]


def rows(activations, layer, at, valid):
    flat = np.asarray(activations[layer], np.float64).reshape(-1, activations.shape[-1])
    return flat[at][valid]


@pytest.mark.full
def test_moments_match_float64_over_all_batches(bases):
    source, target = bases
    batches = [batch(0), batch(1)]
    moments = cross_moments(BasePair(source, target), batches, LAYERS, DENSE_ROLES, grams=True)
    seen = [
        (captured(source, item.tokens_src, item.mask_src), captured(target, item.tokens_tgt, item.mask_tgt))
        for item in batches
    ]
    for role, site in ((role, INPUT_SITES[role]) for role in DENSE_ROLES):
        for place, (name, sums, squares, grams) in enumerate(
            [
                (site, moments.inputs, moments.input_squares, moments.input_grams),
                (role, moments.outputs, moments.output_squares, moments.output_grams),
            ]
        ):
            for layer, feeder in enumerate(LAYERS):
                pairs = [
                    (
                        rows(src[place][name], feeder, item.at_src, item.valid),
                        rows(tgt[place][name], layer, item.at_tgt, item.valid),
                    )
                    for item, (src, tgt) in zip(batches, seen, strict=True)
                ]
                want = sum(x.T @ y for x, y in pairs)
                np.testing.assert_allclose(sums[name][layer], want, atol=1e-4 * np.abs(want).max())
                sizes = [sum(np.sum(pair[side] ** 2, axis=0) for pair in pairs) for side in (0, 1)]
                for side in (0, 1):
                    np.testing.assert_allclose(squares[name][side][layer], sizes[side], rtol=1e-5)
                    own = sum(pair[side].T @ pair[side] for pair in pairs)
                    np.testing.assert_allclose(grams[name][side][layer], own, atol=1e-4 * np.abs(own).max())


def test_only_requested_moments_are_collected(bases):
    moments = cross_moments(BasePair(*bases), [batch(0)], LAYERS, {"q_proj", "v_proj"})
    assert set(moments.inputs) == {"attn_in"}
    assert set(moments.outputs) == {"q_proj", "v_proj"}
    assert moments.input_grams is None
    assert moments.output_grams is None


def test_layer_without_a_source_does_not_affect_the_others(bases):
    whole = cross_moments(BasePair(*bases), [batch(0)], LAYERS, {"v_proj"})
    part = cross_moments(BasePair(*bases), [batch(0)], (None, LAYERS[1]), {"v_proj"})
    np.testing.assert_array_equal(whole.inputs["attn_in"][1], part.inputs["attn_in"][1])


@pytest.mark.parametrize("grams", [False, True])
def test_moments_are_updated_in_place(grams):
    layers, positions, width = 24, 16, 192
    rows = {"attn_in": jnp.ones((layers, positions, width))}, {"q_proj": jnp.ones((layers, positions, width))}
    totals = zero_moments(rows, rows, grams=grams)
    feeders = jnp.arange(layers, dtype=jnp.int32)
    used = add_rows.lower(totals, rows, rows, feeders).compile().memory_analysis()
    moments = sum(array.nbytes for array in jax.tree.leaves(totals))
    assert used.alias_size_in_bytes >= moments - 64  # the result lies where the totals were
    assert used.temp_size_in_bytes < moments / 4
    assert used.output_size_in_bytes < 1.01 * moments


def test_embedding_rows_of_absent_tokens_have_no_effect(bases, tmp_path):
    """Only the embeddings of tokens that occur are kept, so others may hold anything."""
    source, target = bases
    item = batch(0)
    tensors = load_file(target.path / "model.safetensors")
    absent = np.setdiff1d(np.arange(WIDER["vocab"]), item.tokens_tgt)
    assert absent.size > 10
    tensors["model.embed_tokens.weight"][absent] = np.nan
    write_llama(tmp_path, seed=1, **WIDER)
    save_file(tensors, tmp_path / "model.safetensors")
    found = cross_moments(BasePair(source, jcl.open_base(tmp_path)), [item], LAYERS, {"q_proj"})
    wanted = cross_moments(BasePair(source, target), [item], LAYERS, {"q_proj"})
    chex.assert_trees_all_equal(found, wanted)
