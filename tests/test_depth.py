"""Compare the similarity of layers with float64, and the ordered depth map with all possible maps."""

from itertools import combinations, combinations_with_replacement
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bases import llama_tensors, open_pair, write_llama

import jcrosslora as jcl
from jcrosslora.decoder import forward, load_model
from jcrosslora.errors import PairingError, UsageError
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.layer_similarity import centred_gram, layer_similarity, ordered_layers
from jcrosslora.relation import pair_modules, parse_depth

WIDER = {"hidden": 56, "heads": 2, "kv_heads": 1, "head_dim": 40, "intermediate": 72, "layers": 2, "vocab": 90}


# --- the ordered map -------------------------------------------------------------------------------------------------


def all_maps(layers_src, layers_tgt):
    if layers_src >= layers_tgt:
        return combinations(range(layers_src), layers_tgt)
    maps = combinations_with_replacement(range(layers_src), layers_tgt)
    return (layers for layers in maps if set(layers) == set(range(layers_src)))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_ordered_map_is_the_best_of_all_maps(layers_src, layers_tgt, seed):
    similarity = np.random.default_rng(seed).uniform(-0.2, 1, (layers_src, layers_tgt))

    def total(layers):
        return sum(similarity[s, t] for t, s in enumerate(layers))

    found = ordered_layers(similarity)
    assert found in set(all_maps(layers_src, layers_tgt))
    assert total(found) == pytest.approx(max(map(total, all_maps(layers_src, layers_tgt))))


def test_layers_of_a_deeper_source_are_used_once_and_of_a_shallower_one_all():
    similarity = np.array([[0.9, 0.8], [0.1, 0.9], [0.2, 0.3]])
    assert ordered_layers(similarity) == (0, 1)
    assert ordered_layers(similarity.T) == (0, 1, 1)
    assert ordered_layers(np.ones((3, 3))) == (0, 1, 2)


# --- similarity ------------------------------------------------------------------------------------------------------


def hsic(x, y):
    """Return the unbiased estimate of Song et al. 2012, Eq. 5, in float64."""
    k, m, n = x @ x.T, y @ y.T, len(x)
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    last = 2 / (n - 2) * np.sum(k @ m)
    return (np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - last) / (n * (n - 3))


def linear_cka(x, y):
    """Return plain linear CKA, which is accurate for many more rows than columns."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.sum((x.T @ y) ** 2) / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def wide(rows, columns, seed):
    """Return rows as in a residual stream, with a mean and a few dimensions hundreds of times larger than the rest."""
    rng = np.random.default_rng(seed)
    sizes = np.ones(columns)
    sizes[:2] = 300
    return rng.normal(size=(rows, columns)) * sizes + 50 * rng.normal(size=columns)


def similarity(x, y, valid=None):
    valid = jnp.ones(len(x), bool) if valid is None else valid
    a, b = (np.asarray(centred_gram(jnp.asarray(z, jnp.float32), valid), np.float64) for z in (x, y))
    return np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b))


def test_centred_gram_matrices_give_the_unbiased_hsic():
    # Few rows, because an error of the centring shrinks with the square of 1 / n.
    x, y = wide(7, 8, 0), wide(7, 11, 1)
    y[:, :5] += x[:, :5]
    valid = np.arange(13) < 7
    padded = [np.concatenate([z, 1e3 * np.ones((6, z.shape[1]))]) for z in (x, y)]
    a, b = (np.asarray(centred_gram(jnp.asarray(z, jnp.float32), jnp.asarray(valid)), np.float64) for z in padded)
    for left, right, pair in ((a, b, (x, y)), (a, a, (x, x)), (b, b, (y, y))):
        assert np.sum(left * right) / (7 * 4) == pytest.approx(hsic(*pair), rel=1e-4)
    assert not a[7:].any()
    assert not np.diagonal(a).any()


def test_similarity_matches_linear_cka_for_many_rows():
    x = wide(1500, 6, 0)
    y = x @ np.random.default_rng(1).normal(size=(6, 9)) + 100 * wide(1500, 9, 2)
    assert similarity(x, y) == pytest.approx(linear_cka(x, y), abs=0.02)


def test_unrelated_streams_have_similarity_near_0_for_few_rows():
    x, y = (np.random.default_rng(seed).normal(size=(40, 200)) for seed in (0, 1))
    assert abs(similarity(x, y)) < 0.1
    assert linear_cka(x, y) > 0.7


def test_similarity_is_invariant_to_rotation_scale_and_shift():
    x = np.random.default_rng(0).normal(size=(40, 12))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 12)))[0]
    assert similarity(x, 3 * x @ rotation + 70) == pytest.approx(1, abs=1e-4)


# --- from the models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return open_pair(tmp_path_factory.mktemp("bases"), **WIDER)


def batch(seed, matches=18, used=16):
    """Return three texts of both bases, the last one padded."""
    rng = np.random.default_rng(seed)
    mask = np.ones((3, 10), bool)
    mask[2, 7:] = False
    tokens = rng.integers(0, 90, (3, 10)).astype(np.int32)
    return SimpleNamespace(
        tokens_src=tokens,
        mask_src=mask,
        tokens_tgt=tokens,
        mask_tgt=mask,
        at_src=np.sort(rng.choice(26, matches, replace=False)).astype(np.int32),
        at_tgt=np.sort(rng.choice(26, matches, replace=False)).astype(np.int32),
        valid=np.arange(matches) < used,
    )


def streams(base, tokens, mask, at):
    run = jax.jit(forward, static_argnames="capture")
    kept = frozenset({"residual"})
    seen = run(load_model(base), tokens, mask=mask, capture=kept).captured["residual"]
    # The first is the embedding.
    return [np.asarray(layer, np.float64).reshape(-1, layer.shape[-1])[at] for layer in seen[1:]]


def test_similarity_of_layers_over_batches_matches_float64(bases):
    source, target = bases
    batches = [batch(0), batch(1, used=11), batch(2, used=3)]  # the last one is too short to count
    found = layer_similarity(BasePair(source, target), batches)
    sums = np.zeros((3, 3, 2)), np.zeros(3), np.zeros(2)
    for item in batches[:2]:
        used = item.valid
        x = streams(source, item.tokens_src, item.mask_src, item.at_src[used])
        y = streams(target, item.tokens_tgt, item.mask_tgt, item.at_tgt[used])
        n = used.sum()
        sums[0][0] += [[n * hsic(a, b) for b in y] for a in x]
        sums[1][:] += [n * hsic(a, a) for a in x]
        sums[2][:] += [n * hsic(b, b) for b in y]
    want = sums[0][0] / np.sqrt(sums[1])[:, None] / np.sqrt(sums[2])
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_every_layer_has_similarity_1_with_itself(bases):
    found = layer_similarity(BasePair(bases[0], bases[0]), [mirrored(batch(0))])
    np.testing.assert_allclose(np.diagonal(found), 1, atol=1e-4)
    assert found.max() <= 1 + 1e-4


def mirrored(item):
    item.at_tgt = item.at_src
    return item


def test_too_short_texts_are_refused(bases):
    with pytest.raises(UsageError, match="no batch of probe texts has 4 positions that both bases share"):
        layer_similarity(BasePair(*bases), [batch(0, used=3)])


def test_similar_is_parsed_but_refused_without_running_bases(bases):
    assert parse_depth("similar") == "similar"
    with pytest.raises(PairingError, match="'similar' is found by running both bases"):
        pair_modules(bases[0].modules, bases[1].modules, "similar")


def test_inserted_layer_is_skipped(tmp_path):
    """The source is the target with one more layer, which changes the stream little."""
    from safetensors.numpy import save_file

    tensors = llama_tensors(layers=3, seed=5)
    deeper = {name: x for name, x in tensors.items() if "layers" not in name}
    odd = llama_tensors(layers=4, seed=77)
    for layer, origin in enumerate((0, 1, None, 2)):
        for name, x in (odd if origin is None else tensors).items():
            if name.startswith(f"model.layers.{layer if origin is None else origin}."):
                deeper[name.replace(f"layers.{layer if origin is None else origin}.", f"layers.{layer}.")] = x
    for name in deeper:
        if name.startswith("model.layers.2.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            deeper[name] = 0.02 * deeper[name]
    write_llama(tmp_path / "source", layers=4)
    write_llama(tmp_path / "target", layers=3)
    save_file(deeper, tmp_path / "source" / "model.safetensors")
    save_file(tensors, tmp_path / "target" / "model.safetensors")
    source, target = jcl.open_base(tmp_path / "source"), jcl.open_base(tmp_path / "target")
    found = layer_similarity(BasePair(source, target), [mirrored(batch(3)), mirrored(batch(4))])
    np.testing.assert_allclose(found[[0, 1], [0, 1]], 1, atol=1e-3)
    assert ordered_layers(found) == (0, 1, 3)
