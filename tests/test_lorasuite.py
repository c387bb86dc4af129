"""LoRASuite: its maps and its head matching against numpy, and what it recovers of a known symmetry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_set import first_of_each
from tiny_bases import ROLES, delta, llama_tensors, random_adapter, write_llama

import jcrosslora as jcl
from jcrosslora import Evidence
from jcrosslora.errors import MethodError
from jcrosslora.maps import HeadMatch, Side, Vocabulary
from jcrosslora.maps.heads import (
    AttentionWeights,
    best_match,
    circuit_cosines,
    embedding_map,
    mean_over_groups,
)
from jcrosslora.methods import METHODS

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, NEURONS, LAYERS, VOCAB = 4, 2, 6, 40, 56, 2, 96
DIMS = {
    "hidden": HIDDEN,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "intermediate": NEURONS,
    "layers": LAYERS,
    "vocab": VOCAB,
}


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def vocabulary(e_src, e_tgt):
    mean_src, mean_tgt = e_src.mean(axis=0), e_tgt.mean(axis=0)
    x, y = e_src - mean_src, e_tgt - mean_tgt
    moments = (jnp.asarray(z / len(x), jnp.float32) for z in (x.T @ y, x.T @ x, y.T @ y))
    means = {"mean_src": jnp.asarray(mean_src, jnp.float32), "mean_tgt": jnp.asarray(mean_tgt, jnp.float32)}
    return Vocabulary(*moments, count=len(x), **means)


@pytest.mark.parametrize("count", [300, 5])
def test_embedding_map_uses_the_pseudo_inverse_of_uncentred_embeddings(count):
    """5 tokens leave most of the 9 directions open: the smallest solution is taken."""
    e_src, e_tgt = normal(count, 9, seed=0) + 2, normal(count, 12, seed=1) - 1
    found = embedding_map(vocabulary(e_src, e_tgt))
    np.testing.assert_allclose(found, np.linalg.pinv(e_src) @ e_tgt, atol=2e-4)


# --- heads ----------------------------------------------------------------------------------------------------------


def attention(heads, kv_heads, size, hidden, seed):
    shapes = ((heads * size, hidden), (kv_heads * size, hidden), (kv_heads * size, hidden), (hidden, heads * size))
    weights = (jnp.asarray(normal(*shape, seed=seed + i), jnp.float32) for i, shape in enumerate(shapes))
    return AttentionWeights(*weights, heads=heads, kv_heads=kv_heads)


def circuits(side, stream):
    """(N, 2 H^2): Q'K and V'O' of each head, in full."""
    q, k, v, o = (np.asarray(x, np.float64) for x in (side.q, side.k, side.v, side.o))
    size = len(q) // side.heads
    rows = []
    for head in range(side.heads):
        own, shared = (slice(n * size, (n + 1) * size) for n in (head, head // (side.heads // side.kv_heads)))
        pair = q[own].T @ k[shared], v[shared].T @ o[:, own].T
        rows.append(np.concatenate([(stream.T @ x @ stream).ravel() for x in pair]))
    return np.stack(rows)


@pytest.mark.parametrize(("tgt_heads", "tgt_groups", "tgt_size"), [(6, 2, 5), (3, 3, 4), (2, 1, 8)])
def test_circuit_cosines_match_numpy(tgt_heads, tgt_groups, tgt_size):
    src, tgt = attention(4, 2, 5, 11, seed=0), attention(tgt_heads, tgt_groups, tgt_size, 13, seed=9)
    stream = normal(11, 13, seed=30)
    x, y = circuits(src, stream), circuits(tgt, np.eye(13))
    want = x @ y.T / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(circuit_cosines(src, tgt, jnp.asarray(stream, jnp.float32)), want, atol=1e-5)


def test_match_has_the_largest_total_and_leaves_surplus_heads_out():
    # Taking the best pair first, (0, 0), would end at 0.9 + 0.1.
    cosines = np.array([[0.9, 0.8], [0.7, 0.1], [0.0, 0.0]])
    np.testing.assert_array_equal(best_match(cosines), [[False, True, False], [True, False, False]])
    assert best_match(cosines.T).sum() == 2


def test_key_head_gets_the_mean_over_its_query_heads():
    match = np.zeros((4, 6), bool)
    match[[0, 1, 2], [5, 4, 0]] = True  # target head 3 has none
    np.testing.assert_array_equal(mean_over_groups(match, 2, 3), [[0, 0, 1], [0.5, 0, 0]])


# --- the maps --------------------------------------------------------------------------------------------------------


def evidence(reads, heads, shapes, seed=0):
    """Sides whose stream has 10 and 12 dimensions; the other side is as wide as `shapes` says."""
    (wide_src, wide_tgt), stream = shapes, jnp.asarray(normal(10, 12, seed=seed), jnp.float32)
    w_src, w_tgt = normal(wide_src, 10, seed=seed + 1), normal(wide_tgt, 12, seed=seed + 2)
    sides = (Side(jnp.asarray(w if reads else w.T, jnp.float32), jnp.ones(w.shape[1]), None) for w in (w_src, w_tgt))
    words = vocabulary(normal(50, 10, seed=3), normal(50, 12, seed=4)).replace(stream=stream)
    return Evidence(*sides, words, None, jax.random.key(0), reads=reads, rank=4, heads=heads), w_src, w_tgt, stream


def apply(fit, update):
    ((p_out, p_in),) = fit.terms
    return np.asarray(p_in(p_out(jnp.asarray(update, jnp.float32)).T).T)


@pytest.mark.parametrize("reads", [True, False])
def test_attention_map_by_head_is_the_published_product(reads):
    """dW_t^j = W_h' dW_s^i (W_s^i)' W_h W_t^j with heads of 3 and of 4 features; target head 0 has no partner."""
    match = np.zeros((3, 2), np.float32)
    match[1, 1], match[2, 0] = 1, 1
    heads = HeadMatch(jnp.asarray(match), jnp.asarray(0.25))
    item, w_src, w_tgt, stream = evidence(reads, heads, (6, 12))
    update = normal(6, 10, seed=8)
    want = np.zeros((12, 12))
    for j, i in ((1, 1), (2, 0)):
        own, theirs = slice(4 * j, 4 * j + 4), slice(3 * i, 3 * i + 3)
        # In the paper's convention a weight is (stream, head).
        want[own] = (stream.T @ update[theirs].T @ w_src[theirs] @ stream @ w_tgt[own].T).T
    fit = METHODS["lorasuite"]().maps(item)
    moved = apply(fit, update if reads else update.T)
    np.testing.assert_allclose(moved if reads else moved.T, want, atol=1e-3)
    assert float(fit.head_cosine) == 0.25


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("shapes", [(20, 15), (7, 15)])
def test_mlp_map_uses_the_pseudo_inverse_of_the_source_weight(reads, shapes):
    """W_i = pinv(W_s) W_h W_t, also where the MLP is narrower than the stream."""
    item, w_src, w_tgt, stream = evidence(reads, None, shapes)
    update = normal(shapes[0], 10, seed=8)
    inner = np.linalg.pinv(w_src.T) @ stream @ w_tgt.T  # (neurons of the source, of the target)
    fit = METHODS["lorasuite"]().maps(item)
    moved = apply(fit, update if reads else update.T)
    np.testing.assert_allclose(moved if reads else moved.T, inner.T @ update @ stream, atol=2e-3)
    assert np.isnan(float(fit.head_cosine))


# --- a known symmetry ------------------------------------------------------------------------------------------------


def orthonormal(tensors):
    """Make the rows of every head orthonormal: there W_s^i (W_s^i)' is the identity."""
    for name, weight in tensors.items():
        if "self_attn" in name:
            rows = weight.T if "o_proj" in name else weight
            heads = [np.linalg.qr(head.T)[0].T for head in np.split(rows, len(rows) // HEAD_DIM)]
            tensors[name] = np.concatenate(heads).T if "o_proj" in name else np.concatenate(heads)
    return tensors


def blocks(order):
    return np.kron(np.eye(len(order))[list(order)], np.eye(HEAD_DIM))


def symmetries(seed):
    """Rotation of the stream, and for each module the exact maps of its outputs and inputs."""
    rng = np.random.default_rng(seed)
    rotation, maps = np.linalg.qr(rng.normal(size=(HIDDEN, HIDDEN)))[0], {}
    for layer in range(LAYERS):
        groups = rng.permutation(KV_HEADS)
        each = HEADS // KV_HEADS
        queries = blocks([group * each + head for group in groups for head in rng.permutation(each)])
        neurons = np.eye(NEURONS)[rng.permutation(NEURONS)]
        inner = {"q_proj": queries, "o_proj": queries, "k_proj": blocks(groups), "v_proj": blocks(groups)}
        for role, parent in ROLES.items():
            own = inner.get(role, neurons)
            pair = (rotation, own) if role in ("o_proj", "down_proj") else (own, rotation)
            maps[f"model.layers.{layer}.{parent}.{role}"] = pair
    return rotation, maps


@pytest.fixture(scope="module", params=[False, True], ids=["any heads", "orthonormal heads"])
def planted(request, tmp_path_factory):
    """A base, and the same one with permuted heads and neurons, a rotated stream and a shuffled vocabulary."""
    import json

    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("planted")
    source = llama_tensors(seed=4, **DIMS)
    source = orthonormal(source) if request.param else source
    rotation, maps = symmetries(5)
    order = np.random.default_rng(6).permutation(VOCAB)
    target = dict(source)
    target["model.embed_tokens.weight"] = (source["model.embed_tokens.weight"] @ rotation.T)[order]
    for name, (p_out, p_in) in maps.items():
        target[f"{name}.weight"] = p_out @ source[f"{name}.weight"] @ p_in.T
    for name, tensors in (("source", source), ("target", target)):
        write_llama(folder / name, **DIMS)
        save_file(
            {key: np.ascontiguousarray(x, np.float32) for key, x in tensors.items()},
            folder / name / "model.safetensors",
        )
    path = folder / "target" / "tokenizer.json"
    text = json.loads(path.read_text())
    text["model"]["vocab"] = {f"w{old}": new for new, old in enumerate(order)}
    path.write_text(json.dumps(text))
    bases = jcl.open_base(folder / "source"), jcl.open_base(folder / "target")
    adapter = random_adapter(bases[0], rank=3)
    return *bases, maps, adapter, jcl.shift(jcl.align(*bases, method="lorasuite"), adapter), request.param


def theory(source, name, maps, update, *, exact):
    """Where the update belongs, with W_s^i (W_s^i)' in front of each head, or projected on the reach of an MLP."""
    p_out, p_in = maps[name]
    weight, update = source.weight(name).astype(np.float64), update
    writes = name.endswith(("o_proj", "down_proj"))
    weight, update = (weight.T, update.T) if writes else (weight, update)
    if "mlp" in name:
        update = weight @ np.linalg.pinv(weight) @ update
    elif not exact:
        heads = zip(np.split(weight, len(weight) // HEAD_DIM), np.split(update, len(update) // HEAD_DIM), strict=True)
        update = np.concatenate([w @ w.T @ u for w, u in heads])
    return p_out @ (update.T if writes else update) @ p_in.T


def test_planted_symmetry_is_recovered_as_far_as_the_equations_allow(planted):
    """Attention: exactly where heads are orthonormal, else up to W W'. MLP: what the neurons can express."""
    source, _, maps, adapter, moved, exact = planted
    assert set(moved.adapter.modules) == set(maps)
    for name in maps:
        want = theory(source, name, maps, delta(adapter.modules[name]), exact=exact)
        np.testing.assert_allclose(delta(moved.adapter.modules[name]), want, atol=2e-3 * np.abs(want).max())


def test_verdict_recognises_related_heads(planted):
    moved = planted[4]
    verdict = jcl.verdict(moved.report)
    assert verdict.level == "aligned"
    assert "heads of the two bases are related (cosine of their circuits 1.000)" in verdict.text
    assert all((row.head_cosine is None) == (".mlp." in row.target) for row in moved.report.rows)
    # The weight cosine is that of the weights, in other coordinates here.
    source, target = planted[:2]
    for row in moved.report.rows:
        one, other = (base.weight(name).ravel() for base, name in ((source, row.source), (target, row.target)))
        assert row.weight_cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-5)
        assert row.part_cosine is None
    assert moved.report.recipe.shared_tokens == VOCAB


# --- other shapes, and what is refused -------------------------------------------------------------------------------

OTHER = {
    "more heads": {"heads": 6, "kv_heads": 3, "head_dim": 10, "hidden": 56, "intermediate": 48},
    "fewer heads": {"heads": 3, "kv_heads": 1, "head_dim": 16, "hidden": 32, "intermediate": 64, "layers": 3},
}


@pytest.mark.parametrize("dims", first_of_each(OTHER.values(), lambda _: None), ids=OTHER.keys())
def test_verdict_recognises_unrelated_bases_of_different_shapes(tmp_path, dims):
    bases = [
        jcl.open_base(write_llama(tmp_path / n, seed=i, **d)) for i, (n, d) in enumerate((("s", DIMS), ("t", dims)))
    ]
    moved = jcl.shift(jcl.align(*bases, method="lorasuite"), random_adapter(bases[0]))
    assert {name: factors.shape for name, factors in moved.adapter.modules.items()} == {
        name: module.shape for name, module in bases[1].modules.items()
    }
    assert all(
        np.isfinite(np.asarray(f.a)).all() and np.isfinite(np.asarray(f.b)).all()
        for f in moved.adapter.modules.values()
    )
    assert jcl.verdict(moved.report).level in ("chance", "weak")


def test_verdict_is_unknown_for_an_mlp_only_adapter(tmp_path):
    base = jcl.open_base(write_llama(tmp_path / "base", **DIMS))
    adapter = random_adapter(base, roles={"up_proj", "down_proj"})
    moved = jcl.shift(jcl.align(base, base, method="lorasuite", sources=adapter.modules), adapter)
    assert jcl.verdict(moved.report).level == "unknown"


def test_bases_without_shared_tokens_are_refused(tmp_path):
    bases = [jcl.open_base(write_llama(tmp_path / str(n), first_token=n, **DIMS)) for n in (0, 1000)]
    with pytest.raises(MethodError, match=r"lorasuite needs tokens that both bases have: .* share 0 tokens"):
        jcl.align(*bases, method="lorasuite")
    bare = jcl.open_base(write_llama(tmp_path / "bare", tokenizer=False, **DIMS))
    with pytest.raises(MethodError, match=r"lorasuite needs tokens that both bases have: .*tokenizer.json"):
        jcl.align(bases[0], bare, method="lorasuite")
