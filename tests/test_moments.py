"""Streamed cross-moments against float64 sums over captured activations."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_bases import write_llama

import jcrosslora as jcl
from jcrosslora.decoder import INPUT_SITES, forward, load_params, settings_of
from jcrosslora.moments import cross_moments

WIDER = {"hidden": 56, "heads": 2, "kv_heads": 1, "head_dim": 40, "intermediate": 72, "layers": 2, "vocab": 90}
LAYERS = (2, 0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_llama(folder / "source", seed=0)
    write_llama(folder / "target", seed=1, **WIDER)
    return jcl.open_base(folder / "source"), jcl.open_base(folder / "target")


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
    seen = forward(settings_of(base), load_params(base), jnp.asarray(tokens), mask=jnp.asarray(mask), capture=names)
    return seen.captured["inputs"], seen.captured["outputs"]


def rows(activations, layer, at, valid):
    flat = np.asarray(activations[layer], np.float64).reshape(-1, activations.shape[-1])
    return flat[at][valid]


def test_sums_are_those_of_float64_over_all_batches(bases):
    source, target = bases
    batches = [batch(0), batch(1)]
    moments = cross_moments(source, target, batches, LAYERS, INPUT_SITES)
    assert float(moments.count) == 20
    seen = [
        (captured(source, item.tokens_src, item.mask_src), captured(target, item.tokens_tgt, item.mask_tgt))
        for item in batches
    ]
    for role, site in INPUT_SITES.items():
        for place, (name, sums, energy) in enumerate(
            [(site, moments.inputs, moments.input_energy), (role, moments.outputs, moments.output_energy)]
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
                sizes = [sum(np.sum(pair[side] ** 2) for pair in pairs) for side in (0, 1)]
                np.testing.assert_allclose(energy[name][layer], sizes, rtol=1e-5)


def test_only_what_is_wanted_is_kept(bases):
    moments = cross_moments(*bases, [batch(0)], LAYERS, {"q_proj", "v_proj"})
    assert set(moments.inputs) == {"attn_in"}
    assert set(moments.outputs) == {"q_proj", "v_proj"}


def test_a_layer_without_a_source_does_not_disturb_the_others(bases):
    whole = cross_moments(*bases, [batch(0)], LAYERS, {"v_proj"})
    part = cross_moments(*bases, [batch(0)], (None, LAYERS[1]), {"v_proj"})
    np.testing.assert_array_equal(whole.inputs["attn_in"][1], part.inputs["attn_in"][1])
