"""Every method of the registry: one contract for all, and a short numpy reference for each."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_set import first_of_each, full_except
from user_methods import HalfCopy

from jcrosslora import Evidence, EvidenceKind
from jcrosslora.errors import MethodError
from jcrosslora.linalg import decompose
from jcrosslora.maps import Activations, ChannelPair, Selection, Side, Vocabulary
from jcrosslora.maps.groups import measure
from jcrosslora.methods import METHODS, MapMethod, Theseus, find_method

RANK = 5
EQUAL, WIDER, NARROWER = ((14, 9), (14, 9)), ((10, 8), (15, 12)), ((15, 12), (10, 8))


def normal(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def side(weight, decomposed, rank=RANK, gain=None):
    svd = decompose(jnp.asarray(weight)[None], rank)[0] if decomposed else None
    svd = jax.tree.map(lambda x: x[0], svd)
    return Side(jnp.asarray(weight), gain if gain is not None else jnp.ones(weight.shape[1]), svd)


def evidence(method, shapes, *, seed=0, rank=RANK, vocabulary=None):
    src, tgt = normal(*shapes[0], seed=seed), normal(*shapes[1], seed=seed + 1)
    wanted = method.requires
    sides = [side(weight, EvidenceKind.SINGULAR_VECTORS in wanted, rank) for weight in (src, tgt)]
    seen = activations(shapes, seed) if EvidenceKind.ACTIVATIONS in wanted else None
    chosen = selection(shapes, seed) if EvidenceKind.SELECTION in wanted else None
    key = jax.random.key(seed) if EvidenceKind.RANDOM_KEY in wanted else None
    scales = channels(shapes, seed) if EvidenceKind.CHANNEL_SCALES in wanted else None
    return Evidence(*sides, vocabulary, seen, key, reads=True, rank=rank, selection=chosen, channels=scales)


@pytest.mark.parametrize("name", ["copy", "cross-lora", "lora-x", "prolora", "random", "select", "theseus"])
def test_evidence_that_was_not_asked_for_is_named(name):
    method = METHODS[name]()
    sides = [side(normal(14, 9, seed=seed), decomposed=False) for seed in range(2)]
    kinds = "|".join(kind.name for kind in method.requires)
    with pytest.raises(MethodError, match=rf"^method {name} reads .*; add EvidenceKind\.({kinds}) to its `requires`$"):
        method.maps(Evidence(*sides, None, None, None, reads=True, rank=RANK, method=name))


def channels(shapes, seed):
    """Scales of the target's rows and columns."""
    rng = np.random.default_rng(seed + 80)
    return ChannelPair(*(jnp.asarray(np.exp(rng.normal(size=size)).astype(np.float32)) for size in shapes[1]))


def selection(shapes, seed):
    """Rows and columns of the source in a random order, some of the target's left without."""
    rng = np.random.default_rng(seed + 70)
    sizes = zip(*shapes, strict=True)
    return Selection(*(jnp.asarray(rng.integers(-1, src, size=tgt).astype(np.int32)) for src, tgt in sizes))


def activations(shapes, seed):
    """Moments of 60 positions whose activations have nothing to do with the weights."""
    (y_s, x_s), (y_t, x_t) = (
        [normal(60, width, seed=100 * seed + 10 * place + k) for k, width in enumerate(shape)]
        for place, shape in enumerate(shapes)
    )
    return moments(x_s, x_t, y_s, y_t)


def moments(x_s, x_t, y_s, y_t):
    """What is known of rows of inputs and outputs."""
    squares = [tuple(jnp.asarray(np.sum(rows**2, axis=0)) for rows in pair) for pair in ((x_s, x_t), (y_s, y_t))]
    grams = [tuple(jnp.asarray(rows.T @ rows) for rows in pair) for pair in ((x_s, x_t), (y_s, y_t))]
    return Activations(jnp.asarray(x_s.T @ x_t), jnp.asarray(y_s.T @ y_t), *squares, *grams)


def usable(method):
    return [EQUAL] if method.equal_shapes else [EQUAL, WIDER, NARROWER]


# One of a user's own has to keep the contract as well.
MAPPED = [method for method in METHODS.values() if issubclass(method, MapMethod)]
CASES = [(method(), shapes) for method in (*MAPPED, HalfCopy) for shapes in usable(method)]
# Each method runs on its first pair of shapes by default.
MARKED = first_of_each(CASES, lambda case: case[0].name)


def name_of(case) -> str:
    return getattr(case, "values", case)[0].name


contract = pytest.mark.parametrize(("method", "shapes"), MARKED, ids=lambda value: getattr(value, "name", str(value)))


def apply(maps, update):
    """The moved update in full: sum of P_out dW P_in'."""
    return sum(np.asarray(p_in(p_out(jnp.asarray(update)).T).T) for p_out, p_in in maps.terms)


@contract
def test_maps_have_the_shapes_and_dtypes_of_the_pair(method, shapes):
    found = method.maps(evidence(method, shapes))
    for p_out, p_in in found.terms:
        for linear_map, axis in ((p_out, 0), (p_in, 1)):
            moved = linear_map(jnp.ones((shapes[0][axis], 3)))
            assert moved.shape == (shapes[1][axis], 3)
            assert moved.dtype == jnp.float32
    assert found.vector_ratio.shape == ()


@contract
def test_maps_are_equal_under_jit_and_vmap(method, shapes):
    items = [evidence(method, shapes, seed=seed) for seed in (0, 10)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)
    batched = jax.jit(jax.vmap(method.maps))(stacked)
    update = normal(*shapes[0], seed=7)
    for place, item in enumerate(items):
        one = jax.tree.map(lambda leaf, place=place: leaf[place], batched)
        np.testing.assert_allclose(apply(one, update), apply(method.maps(item), update), atol=1e-4)


@pytest.mark.parametrize("words", [False, True], ids=["alone", "vocabulary"])
@pytest.mark.parametrize("method", [method() for method in MAPPED if method.takes_numpy], ids=lambda one: one.name)
def test_maps_and_figures_of_numpy_are_those_of_jax(method, words):
    shapes = usable(method)[-1]
    known = vocabulary_of(normal(60, shapes[0][1], seed=5), normal(60, shapes[1][1], seed=6)) if words else None
    item, update = evidence(method, shapes, vocabulary=known), normal(*shapes[0], seed=7)

    def found(item):
        maps = method.maps(item)
        return maps, measure(item, maps, by_coordinates=False)

    compiled, (maps, figures) = jax.jit(found)(item), found(jax.tree.map(np.asarray, item))
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((maps, figures)))
    np.testing.assert_allclose(apply(maps, update), apply(compiled[0], update), atol=1e-5)
    for name, figure in figures.items():
        np.testing.assert_allclose(figure, compiled[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


@contract
def test_equal_evidence_gives_equal_maps(method, shapes):
    first, second = (method.maps(evidence(method, shapes)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@contract
def test_map_is_linear_in_the_update(method, shapes):
    found = method.maps(evidence(method, shapes))
    x, y = normal(*shapes[0], seed=1), normal(*shapes[0], seed=2)
    np.testing.assert_allclose(apply(found, 2 * x - y), 2 * apply(found, x) - apply(found, y), atol=1e-4)


@contract
def test_agreement_figures_are_finite_or_nan(method, shapes):
    item = evidence(method, shapes)
    figures = measure(item, method.maps(item), by_coordinates=method.measure == "weight cosine")
    assert math.isnan(float(figures["energy_src"])) == (EvidenceKind.SINGULAR_VECTORS not in method.requires)
    if method.measure == "weight cosine" or method.equal_shapes:
        assert abs(float(figures["weight_cosine"])) <= 1
    if EvidenceKind.SINGULAR_VECTORS in method.requires and shapes == EQUAL:
        assert float(figures["similarity_out"]) > 0


# --- one reference a method, in numpy float64, over full SVDs -----------------------------------------------------


def bases(weight, rank=RANK):
    u, _, vt = np.linalg.svd(weight.astype(np.float64))
    return u[:, :rank], vt[:rank].T


def reference_lora_x(w_src, w_tgt, update):
    u, v = bases(w_tgt)
    return u @ u.T @ update @ v @ v.T


def reference_prolora(w_src, w_tgt, update):
    (u_s, v_s), (u_t, v_t) = bases(w_src), bases(w_tgt)
    (pus, pvs), (put, pvt) = (u_s @ u_s.T, v_s @ v_s.T), (u_t @ u_t.T, v_t @ v_t.T)
    eye_o, eye_i = np.eye(len(w_src)), np.eye(w_src.shape[1])
    within = put @ pus @ update @ pvs @ pvt
    outside = (eye_o - put) @ (eye_o - pus) @ update @ (eye_i - pvs) @ (eye_i - pvt)
    return within + outside


def reference_copy(item, update):
    rows, columns = (np.asarray(one, np.float64) for one in (item.channels.rows, item.channels.columns))
    return rows[:, None] * update * columns


def reference_pad_truncate(w_src, w_tgt, update):
    moved = np.zeros(w_tgt.shape)
    rows, columns = np.minimum(w_src.shape, w_tgt.shape)
    moved[:rows, :columns] = update[:rows, :columns]
    return moved


def reference_half_copy(w_src, w_tgt, update):
    return HalfCopy().share * reference_pad_truncate(w_src, w_tgt, update)


def canonical(x):
    return x * np.sign(np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0))


def reference_cross_lora(w_src, w_tgt, update):
    """Without a vocabulary: the largest entry of each right vector (here the stream's side) is made positive."""
    (u_s, v_s), (u_t, v_t) = bases(w_src), bases(w_tgt)
    signs = np.diag(canonical(v_s).T @ v_s) * np.diag(canonical(v_t).T @ v_t)
    return (u_t * signs) @ u_s.T @ update @ v_s @ (v_t * signs).T


def polar(moment):
    u, _, vt = np.linalg.svd(np.asarray(moment, np.float64), full_matrices=False)
    return u @ vt


def reference_theseus(moments, update):
    return polar(moments.outputs).T @ update @ polar(moments.inputs)


def reference_select(item, update):
    """Row by row and column by column, zero where there is none."""
    outputs, inputs = np.asarray(item.selection.outputs), np.asarray(item.selection.inputs)
    want = np.zeros((len(outputs), len(inputs)))
    for place in np.argwhere((outputs[:, None] >= 0) & (inputs >= 0)):
        want[tuple(place)] = update[outputs[place[0]], inputs[place[1]]]
    return want


REFERENCES = {
    "cross-lora": reference_cross_lora,
    "lora-x": reference_lora_x,
    "prolora": reference_prolora,
    "pad-truncate": reference_pad_truncate,
    "half-copy": reference_half_copy,
}


NOTHING = {"distill"}  # which has no maps
# What they add to the copy, the difference of the bases or a fit, comes later.
COPIES = {"copy", "interpolated-copy", "compensated-copy", "distilled-copy"}


@pytest.mark.parametrize(("method", "shapes"), [case for case in MARKED if name_of(case) != "random"])
def test_maps_match_the_numpy_reference(method, shapes):
    item = evidence(method, shapes)
    update = normal(*shapes[0], seed=5)
    if EvidenceKind.ACTIVATIONS in method.requires:
        want = reference_theseus(item.activations, update.astype(np.float64))
    elif EvidenceKind.SELECTION in method.requires:
        want = reference_select(item, update.astype(np.float64))
    elif EvidenceKind.CHANNEL_SCALES in method.requires:
        want = reference_copy(item, update.astype(np.float64))
    elif method.name in NOTHING:
        want = np.zeros(shapes[1])
    else:
        weights = np.asarray(item.src.weight), np.asarray(item.tgt.weight)
        want = REFERENCES[method.name](*weights, update.astype(np.float64))
    np.testing.assert_allclose(apply(method.maps(item), update), want, atol=2e-4)


def test_every_method_except_random_has_a_numpy_reference():
    shipped = {name for name, method in METHODS.items() if method.__module__.startswith("jcrosslora.")}
    assert shipped | {HalfCopy.name} == set(REFERENCES) | NOTHING | COPIES | {
        "theseus",
        "select",
        "distilled-select",  # before the fit
        "random",
    }


def test_random_maps_are_partial_isometries_that_depend_on_the_key():
    method = METHODS["random"]()
    item = evidence(method, WIDER)
    ((p_out, p_in),) = method.maps(item).terms
    for linear_map, size in ((p_out, 10), (p_in, 8)):
        singular = np.linalg.svd(np.asarray(linear_map(jnp.eye(size))), compute_uv=False)
        np.testing.assert_allclose(singular[:RANK], 1, atol=1e-5)
        np.testing.assert_allclose(singular[RANK:], 0, atol=1e-5)
    other = method.maps(item.replace(key=jax.random.key(99))).terms[0][0]
    assert np.abs(np.asarray(other.left) - np.asarray(p_out.left)).max() > 0.1


# --- signs ---------------------------------------------------------------------------------------------------------


def rotated_pair(seed=0):
    """Two modules that differ by a rotation of the stream (columns) and a permutation of the outputs, full rank."""
    rng = np.random.default_rng(seed)
    w_src = rng.normal(size=(14, 9)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(9, 9)))[0].astype(np.float32)
    order = rng.permutation(14)
    return w_src, (w_src @ rotation.T)[order], rotation, order


def vocabulary_of(e_src, e_tgt):
    e_src, e_tgt = e_src - e_src.mean(axis=0), e_tgt - e_tgt.mean(axis=0)
    moments = (jnp.asarray(x) for x in (e_src.T @ e_tgt, e_src.T @ e_src, e_tgt.T @ e_tgt))
    return Vocabulary(*(x / len(e_src) for x in moments), count=len(e_src))


def scramble(module, seed):
    """Flip the joint signs of a decomposition at random: an equally valid one."""
    flips = jnp.asarray(np.random.default_rng(seed).choice([-1.0, 1.0], module.svd.s.shape[0]), jnp.float32)
    return module.replace(svd=module.svd.replace(u=module.svd.u * flips, v=module.svd.v * flips))


@pytest.mark.parametrize("seed", range(4))
def test_shared_vocabulary_fixes_arbitrary_signs(seed):
    w_src, w_tgt, rotation, order = rotated_pair(seed)
    e_src = normal(200, 9, seed=seed + 50) + 3.0
    vocabulary = vocabulary_of(e_src, e_src @ rotation.T)
    sides = scramble(side(w_src, True, 9), seed), scramble(side(w_tgt, True, 9), seed + 1)
    found = METHODS["cross-lora"]().maps(Evidence(*sides, vocabulary, None, jax.random.key(0), reads=True, rank=9))
    coefficients = normal(9, 9, seed=seed)
    update = np.asarray(sides[0].svd.u) @ coefficients @ np.asarray(sides[0].svd.v).T
    np.testing.assert_allclose(apply(found, update), (update @ rotation.T)[order], atol=2e-3)
    assert float(found.vector_ratio) > 20


def test_sign_anchor_includes_norm_gains():
    """Folding a norm gain into the weight instead of the embedding side must not change which vectors agree."""
    w_src, w_tgt, rotation, _ = rotated_pair(3)
    e_src = normal(300, 9, seed=1)
    gain_src, gain_tgt = (jnp.asarray(np.random.default_rng(s).uniform(0.5, 2, 9), jnp.float32) for s in (1, 2))
    # The tokens as the modules see them: embeddings times gain. Divide the gain out of the embeddings first.
    vocabulary = vocabulary_of(e_src / np.asarray(gain_src), e_src @ rotation.T / np.asarray(gain_tgt))
    sides = side(w_src, True, 9, gain_src), side(w_tgt, True, 9, gain_tgt)
    found = METHODS["cross-lora"]().maps(Evidence(*sides, vocabulary, None, jax.random.key(0), reads=True, rank=9))
    assert float(found.vector_ratio) > 20


@pytest.mark.full
def test_independent_bases_are_at_chance_level():
    method = METHODS["cross-lora"]()
    w_src, w_tgt = normal(60, 40, seed=0), normal(60, 48, seed=1)
    vocabulary = vocabulary_of(normal(500, 40, seed=2), normal(500, 48, seed=3))
    sides = side(w_src, True, 40), side(w_tgt, True, 40)
    sides = sides[0], sides[1].replace(gain=jnp.ones(48))
    found = method.maps(Evidence(*sides, vocabulary, None, jax.random.key(0), reads=True, rank=40))
    assert 0.5 < float(found.vector_ratio) < 1.7


def test_without_vocabulary_signs_are_reproducible_and_the_ratio_is_nan():
    w_src, w_tgt, _, _ = rotated_pair()
    update = normal(14, 9, seed=3)
    moved = []
    for seed in (0, 1):
        sides = scramble(side(w_src, True, 9), seed), scramble(side(w_tgt, True, 9), seed + 7)
        found = METHODS["cross-lora"]().maps(Evidence(*sides, None, None, jax.random.key(0), reads=True, rank=9))
        moved.append(apply(found, update))
        assert math.isnan(float(found.vector_ratio))
    np.testing.assert_allclose(moved[0], moved[1], atol=1e-5)


# --- the same model on both sides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["copy", "pad-truncate", "cross-lora", "lora-x"])
def test_equal_bases_keep_the_update(name):
    """Coordinate methods return the update; subspace methods its projection on the base's singular subspaces."""
    method = METHODS[name]()
    weight, update = normal(14, 9, seed=0), normal(14, 9, seed=1)
    both = side(weight, EvidenceKind.SINGULAR_VECTORS in method.requires)
    ones = ChannelPair(jnp.ones(14), jnp.ones(9))
    found = method.maps(Evidence(both, both, None, None, jax.random.key(0), reads=True, rank=RANK, channels=ones))
    u, v = bases(weight)
    want = u @ u.T @ update @ v @ v.T if EvidenceKind.SINGULAR_VECTORS in method.requires else update
    np.testing.assert_allclose(apply(found, update), want, atol=1e-4)


def test_prolora_on_the_same_base_keeps_both_diagonal_blocks():
    method = METHODS["prolora"]()
    weight, update = normal(14, 9, seed=0), normal(14, 9, seed=1)
    both = side(weight, True)
    found = method.maps(Evidence(both, both, None, None, jax.random.key(0), reads=True, rank=RANK))
    u, v = bases(weight)
    p, q = u @ u.T, v @ v.T
    want = p @ update @ q + (np.eye(14) - p) @ update @ (np.eye(9) - q)
    np.testing.assert_allclose(apply(found, update), want, atol=1e-4)


def test_unknown_method_is_refused():
    with pytest.raises(MethodError, match="'magic' is unknown; use one of auto, cross-lora"):
        find_method("magic")


@pytest.mark.parametrize("reads", full_except([True, False], [False]))
def test_similarity_by_tokens_equals_similarity_by_coordinates_for_isotropic_embeddings(reads):
    """Embed the target's stream in a wider one by an isometry: nothing but the coordinates changes."""
    method = METHODS["cross-lora"]()
    stream = 20
    shape = (14, stream) if reads else (stream, 14)
    w_src, w_tgt = normal(*shape, seed=0), normal(*shape, seed=1)
    isometry = np.linalg.qr(normal(25, stream, seed=2))[0]
    wide = w_tgt @ isometry.T if reads else isometry @ w_tgt
    eye = jnp.eye(stream)

    def figure(weight, width, cross):
        gram = jnp.asarray(cross.T @ cross)
        vocabulary = Vocabulary(jnp.asarray(cross), eye, gram, count=stream)
        sides = side(w_src, True, gain=jnp.ones(stream)), side(weight, True, gain=jnp.ones(width))
        item = Evidence(*sides, vocabulary, None, jax.random.key(0), reads=reads, rank=RANK)
        figures = measure(item, method.maps(item), by_coordinates=False)
        return float(figures["similarity_in" if reads else "similarity_out"])

    want = figure(w_tgt, stream, np.eye(stream, dtype=np.float32))
    assert figure(wide, 25, isometry.T) == pytest.approx(want, rel=1e-3)


def test_theseus_recovers_a_rotation_of_the_stream_and_a_permutation_of_the_outputs():
    w_src, w_tgt, rotation, order = rotated_pair(5)
    x = normal(200, 9, seed=8) * np.geomspace(1, 30, 9, dtype=np.float32)
    y = x @ w_src.T
    x_t, y_t = x @ rotation.T, y[:, order]
    seen = moments(x, x_t, y, y_t)
    sides = side(w_src, False), side(w_tgt, False)
    found = METHODS["theseus"]().maps(Evidence(*sides, None, seen, jax.random.key(0), reads=True, rank=5))
    inside = w_src @ normal(9, 9, seed=2)  # outputs that never occur cannot be told apart: stay among those that do
    np.testing.assert_allclose(apply(found, inside), (inside @ rotation.T)[order], atol=1e-3 * np.abs(inside).max())
    assert float(found.activation_cosine) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("power", full_except([0.1, 0.25, 0.5], [0.25]))
def test_partially_whitened_theseus_is_the_polar_factor_of_the_whitened_moment(power):
    (y_s, x_s), (y_t, x_t) = (
        [normal(200, width, seed=10 * place + k) * np.geomspace(1, 9, width, dtype=np.float32) for k, width in shape]
        for place, shape in enumerate((((0, 10), (1, 8)), ((2, 15), (3, 12))))
    )
    x_t[:, :8] += 2 * x_s
    y_t[:, 3:13] -= 2 * y_s
    sides = side(normal(10, 8, seed=5), False), side(normal(15, 12, seed=6), False)
    item = Evidence(*sides, None, moments(x_s, x_t, y_s, y_t), jax.random.key(0), True, 5)
    found = jax.jit(Theseus(whitening=power).maps)(item)

    def whitened(rows):
        values, vectors = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
        return rows @ (vectors * values**-power) @ vectors.T

    cosines = []
    for turn, src, tgt in zip(reversed(found.terms[0]), (x_s, y_s), (x_t, y_t), strict=True):
        src, tgt = whitened(src), whitened(tgt)
        u, s, vt = np.linalg.svd(src.T @ tgt, full_matrices=False)
        np.testing.assert_allclose(np.asarray(turn.left @ turn.right.T), vt.T @ u.T, atol=2e-4)
        cosines.append(s.sum() / np.linalg.norm(src) / np.linalg.norm(tgt))
    assert float(found.activation_cosine) == pytest.approx(np.sqrt(np.prod(cosines)), rel=1e-4)
