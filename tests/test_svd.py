"""Truncated SVD: identities on matrices with a prescribed spectrum, against float64."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jcrosslora.linalg import (
    choose_kernel,
    decompose,
    describe_kernels,
    full_svd,
    gram_svd,
    krylov_svd,
    refine,
)
from jcrosslora.linalg import svd as choose
from jcrosslora.linalg.host import leading_eigenvectors
from jcrosslora.linalg.svd import GUARD, KERNELS
from jcrosslora.linalg.svd_float64 import gram_on_host
from jcrosslora.linalg.svd_kernels import gram_matrix, krylov_columns

ROUTES = [jax.jit(one, static_argnames=("rank", "vectors", "guard")) for one in (full_svd, gram_svd)]
FULL, GRAM = ROUTES
# Kernels with options for matrices of side 64: with its defaults, Krylov would fall back to the Gram kernel.
SMALL = {
    "full": full_svd,
    "gram": gram_svd,
    "krylov": partial(krylov_svd, block=4),
}
every_kernel = pytest.mark.parametrize("kernel", SMALL)
every_shape = pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96), (64, 64)])


def matrix(rows, columns, spectrum, seed=0):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(rows, len(spectrum))))
    v, _ = np.linalg.qr(rng.normal(size=(columns, len(spectrum))))
    return (u * np.asarray(spectrum)) @ v.T, u, v


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("rank", [1, 7, 24])
def test_triplets_of_a_known_spectrum(route, rows, columns, rank):
    spectrum = np.geomspace(10, 0.5, 24)
    w, u, v = matrix(rows, columns, spectrum)
    svd = route(jnp.asarray(w, jnp.float32), rank)
    np.testing.assert_allclose(svd.s, spectrum[:rank], rtol=1e-4)
    # Singular vectors are unique up to a joint sign, so the products u_i v_i' are compared.
    products = np.einsum("or,ir->roi", svd.u, svd.v)
    np.testing.assert_allclose(products, np.einsum("or,ir->roi", u, v)[:rank], atol=2e-3)
    np.testing.assert_allclose(svd.energy, (spectrum[:rank] ** 2).sum() / (spectrum**2).sum(), rtol=1e-5)
    assert int(svd.numerical_rank) == rank
    np.testing.assert_allclose(svd.condition, spectrum[0] / spectrum[rank - 1], rtol=1e-3)


def test_gap_is_the_relative_distance_at_the_cut():
    spectrum = np.array([4.0, 3.0, 2.0, 1.0, 0.5])
    w, _, _ = matrix(12, 9, spectrum)
    assert float(FULL(jnp.asarray(w, jnp.float32), 3).gap) == pytest.approx(0.5, abs=1e-4)
    assert float(FULL(jnp.asarray(w, jnp.float32), 5).gap) == pytest.approx(1.0, abs=1e-4)


def test_error_grows_with_close_neighbours_and_bounds_the_true_error():
    wide, narrow = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([5.0, 4.0, 4.0 - 1e-4, 2.0, 1.0])
    for spectrum in (wide, narrow):
        w, u, _ = matrix(60, 30, spectrum)
        svd = GRAM(jnp.asarray(w, jnp.float32), 4)
        ours, exact = np.asarray(svd.u, np.float64), u[:, :4]
        beside = ours - exact * np.sum(ours * exact, axis=0)  # the component orthogonal to the exact vector
        assert np.linalg.norm(beside, axis=0).max() <= 10 * float(svd.error)
    errors = [float(GRAM(jnp.asarray(matrix(60, 30, s)[0], jnp.float32), 4).error) for s in (wide, narrow)]
    assert errors[1] > 100 * errors[0]


def test_close_neighbours_do_not_raise_the_error_of_the_subspace():
    w, u, _ = matrix(60, 30, [5.0, 4.0, 4.0, 2.0, 1.0])
    svd = GRAM(jnp.asarray(w, jnp.float32), 3, vectors=False)
    assert float(svd.error) < 1e-5
    np.testing.assert_allclose(np.asarray(svd.u) @ np.asarray(svd.u).T, u[:, :3] @ u[:, :3].T, atol=1e-4)


def test_a_matrix_that_the_gram_kernel_cannot_resolve_is_redone():
    easy, _, _ = matrix(48, 32, np.linspace(10, 1, 32))
    hard, u, _ = matrix(48, 32, np.r_[np.linspace(10, 1, 29), 1e-3, 5e-4, 2e-4], seed=1)
    stack = jnp.asarray(np.stack([easy, hard]), jnp.float32)
    # As on an accelerator, then as on a CPU.
    on_device, redone = choose._decompose_stack(stack, "gram", 32, True, 1e-2)
    assert redone == ("gram", "gram in float64")
    on_host, used = decompose(stack, 32)
    assert used == ("gram in float64", "gram in float64")
    for svd in (on_device, on_host):
        assert (np.asarray(svd.error) <= 1e-2).all()
        for place in (-3, -2, -1):
            assert abs(float(np.asarray(svd.u)[1, :, place] @ u[:, place])) > 0.999


@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (64, 96), (64, 64)])
def test_the_host_kernel_is_exact_and_keeps_the_order_of_the_stack(rows, columns):
    made = [matrix(rows, columns, slow(64), seed) for seed in range(7)]
    found = gram_on_host([w.astype(np.float32) for w, _, _ in made], 20)
    for svd, (w, u, v) in zip(found, made, strict=True):
        assert turned(svd, u, v, 20).max() < 1e-4
        assert turned(svd, u, v, 20).max() < max(1e-5, 10 * svd.error)
        np.testing.assert_allclose(svd.s, slow(64)[:20], rtol=1e-5)
        np.testing.assert_allclose(svd.energy, (slow(64)[:20] ** 2).sum() / (slow(64) ** 2).sum(), rtol=1e-5)
        residual = (
            np.linalg.norm(w @ svd.v - svd.u * svd.s, axis=0),
            np.linalg.norm(w.T @ svd.u - svd.v * svd.s, axis=0),
        )
        assert (np.hypot(*residual) / 2**0.5 < 2 * svd.residual + 1e-6).all()
        assert all(x.dtype == np.float32 for x in (svd.u, svd.v, svd.s, svd.error, svd.gap))


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (70, 1), (70, 50), (200, 200)])
def test_leading_eigenvectors_are_those_of_numpy(size, count):
    w = np.random.default_rng(size).normal(size=(size + 3, size))
    wanted, exact = np.linalg.eigh(w.T @ w)
    values, vectors = leading_eigenvectors(w.T @ w, count)
    np.testing.assert_allclose(values, wanted[::-1], rtol=1e-9, atol=1e-12 * wanted[-1])
    assert vectors.dtype == np.float32
    # Up to a sign each.
    np.testing.assert_allclose(np.abs(np.sum(vectors.T * exact[:, ::-1][:, :count], axis=0)), 1, atol=1e-6)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(count), atol=3e-6)


def test_a_matrix_with_nan_does_not_affect_others_on_the_host():
    w = matrix(24, 20, slow(20))[0].astype(np.float32)
    good, bad = gram_on_host([w, np.full_like(w, np.nan)], 6)
    assert np.isnan(bad.error)
    assert not bad.u.any()
    assert good.error < 1e-4


def test_vectors_of_zero_singular_values_are_zero():
    w, u, v = matrix(20, 12, [3.0, 2.0, 1.0])
    svd, _ = decompose(jnp.asarray(w, jnp.float32)[None], 8)
    assert int(svd.numerical_rank[0]) == 3
    np.testing.assert_allclose(np.asarray(svd.u[0]) @ np.asarray(svd.u[0]).T, u @ u.T, atol=1e-4)
    np.testing.assert_allclose(np.asarray(svd.v[0]) @ np.asarray(svd.v[0]).T, v @ v.T, atol=1e-4)
    assert not np.asarray(svd.u[0])[:, 3:].any()


def test_a_zero_matrix_gives_zero_vectors_and_no_nan():
    svd, _ = decompose(jnp.zeros((1, 6, 4)), 3)
    assert int(svd.numerical_rank[0]) == 0
    for leaf in (svd.u, svd.v, svd.s, svd.energy, svd.gap, svd.condition):
        assert not np.asarray(leaf).any()


@pytest.mark.parametrize("size", [1e-15, 1e12])
def test_results_do_not_depend_on_the_scale_of_the_weights(size):
    w, u, _ = matrix(20, 12, np.linspace(3, 1, 12))
    svd, _ = decompose(jnp.asarray(w * size, jnp.float32)[None], 5)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(svd.u[0]) * u[:, :5], axis=0)), 1, atol=1e-4)
    np.testing.assert_allclose(svd.s[0], np.linspace(3, 1, 12)[:5] * size, rtol=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_projections_agree_with_float64_on_any_shape(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    w = np.random.default_rng(rows * 10 + columns).normal(size=(rows, columns))
    svd, _ = decompose(jnp.asarray(w, jnp.float32)[None], rank)
    u, s, vt = np.linalg.svd(w)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    ours = (np.asarray(svd.u[0]) * np.asarray(svd.s[0])) @ np.asarray(svd.v[0]).T
    np.testing.assert_allclose(ours, best, atol=1e-3)


# --- all kernels ----------------------------------------------------------------------------------------------------


def slow(count=64):
    """Return a spectrum like that of language models: close neighbours, and much energy beyond any cut."""
    return np.arange(1, count + 1) ** -0.33


def turned(svd, u, v, rank):
    """Return the sine (R,) of the angle between [u; v] and the exact pair, up to a joint sign."""
    ours = np.concatenate([np.asarray(svd.u, np.float64), np.asarray(svd.v, np.float64)])[:, :rank] / 2**0.5
    exact = np.concatenate([u, v])[:, :rank] / 2**0.5
    return np.linalg.norm(ours - exact * np.sum(ours * exact, axis=0), axis=0)


def captured(w, svd):
    """Return the share of the energy of W in the span of u, in float64."""
    basis, _ = np.linalg.qr(np.asarray(svd.u, np.float64))
    return np.linalg.norm(basis.T @ w) ** 2 / np.linalg.norm(w) ** 2


@cache
def program(kernel, **options):
    return jax.jit(partial(SMALL[kernel], **options))


def run(kernel, w, **options):
    return program(kernel, **{"rank": 8, **options})(jnp.asarray(w, jnp.float32))


@every_kernel
@every_shape
def test_kernels_on_a_slowly_decaying_spectrum_agree_with_float64(kernel, rows, columns):
    w, u, v = matrix(rows, columns, slow())
    svd = run(kernel, w)
    energy = (slow()[:8] ** 2).sum() / (slow() ** 2).sum()
    np.testing.assert_allclose(svd.s, slow()[:8], rtol=1.4e-5)
    assert turned(svd, u, v, 8).max() <= min(2e-2, float(svd.error))
    assert float(svd.energy) == pytest.approx(captured(w, svd), abs=1e-6)
    assert energy - captured(w, svd) <= 4e-6
    assert int(svd.numerical_rank) == 8
    ours_u, s, ours_v = (np.asarray(x, np.float64) for x in (svd.u, svd.s, svd.v))
    for basis in (ours_u, ours_v):
        np.testing.assert_allclose(basis.T @ basis, np.eye(8), atol=1e-4)
    sides = np.linalg.norm(w @ ours_v - ours_u * s, axis=0), np.linalg.norm(w.T @ ours_u - ours_v * s, axis=0)
    np.testing.assert_allclose(svd.residual, np.hypot(*sides) / 2**0.5, rtol=0.05, atol=3e-7)


def test_a_kernel_that_has_not_converged_reports_a_large_error():
    w, u, v = matrix(96, 64, slow())
    svd = run("krylov", w, depth=1)
    assert turned(svd, u, v, 8).max() > 0.1
    assert float(svd.error) > 0.1
    assert float(jnp.max(svd.residual)) > 1e-2


@every_kernel
def test_guard_triplets_do_not_change_the_scalars(kernel):
    w = matrix(96, 64, slow())[0]
    alone, guarded = run(kernel, w), run(kernel, w, guard=5)
    assert guarded.u.shape == (96, 13)
    assert guarded.residual.shape == (13,)
    np.testing.assert_allclose(guarded.s[:8], alone.s, rtol=1e-3)
    for name in ("energy", "gap", "condition", "numerical_rank"):
        np.testing.assert_allclose(getattr(guarded, name), getattr(alone, name), rtol=5e-2)


@every_kernel
@pytest.mark.parametrize("count", [0, 5], ids=["zero", "low rank"])
def test_low_rank_and_zero_matrices_give_zero_vectors_and_no_nan(kernel, count):
    w, u, v = matrix(96, 64, slow(count)) if count else (np.zeros((96, 64)), np.zeros((96, 0)), np.zeros((64, 0)))
    svd = run(kernel, w)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(svd))
    # The Gram matrix turns zeros into noise of 3e-4 of the largest; the error is infinite then.
    if np.isfinite(svd.error):
        assert int(svd.numerical_rank) == count
    np.testing.assert_allclose(np.asarray(svd.u)[:, :count] @ np.asarray(svd.u)[:, :count].T, u @ u.T, atol=1e-3)
    np.testing.assert_allclose(np.asarray(svd.v)[:, :count] @ np.asarray(svd.v)[:, :count].T, v @ v.T, atol=1e-3)


@every_kernel
def test_equal_singular_values_give_orthonormal_vectors_with_a_large_error(kernel):
    w, u, _ = matrix(96, 64, np.r_[np.full(3, 2.0), slow(61)])
    svd = run(kernel, w)
    assert float(svd.error) > 0.1
    np.testing.assert_allclose(np.asarray(svd.u).T @ np.asarray(svd.u), np.eye(8), atol=1e-4)
    np.testing.assert_allclose(np.asarray(svd.u)[:, :3] @ np.asarray(svd.u)[:, :3].T, u[:, :3] @ u[:, :3].T, atol=2e-3)
    assert float(run(kernel, w, vectors=False).error) < 0.1


@every_kernel
def test_matrices_that_are_not_finite_never_meet_a_tolerance(kernel):
    w = matrix(96, 64, slow())[0]
    w[3, 4] = np.nan
    assert not float(run(kernel, w).error) <= np.inf


# --- parts of kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 3), (1031, 1030), (1030, 1031)])
def test_the_gram_matrix_from_its_upper_blocks_is_complete(shape):
    w = np.random.default_rng(0).normal(size=shape)
    gram = np.asarray(gram_matrix(jnp.asarray(w, jnp.float32)))
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(gram, w @ w.T if shape[0] < shape[1] else w.T @ w, atol=1e-2)


def test_krylov_finds_more_copies_of_a_singular_value_than_a_block_has_columns():
    spectrum = np.r_[np.full(12, 2.0), slow(84)]
    w, _, _ = matrix(100, 96, spectrum)
    assert krylov_columns(12, block=4) < 96
    svd = run("krylov", w, rank=12, vectors=False)
    found = captured(w, svd) / ((spectrum[:12] ** 2).sum() / (spectrum**2).sum())
    # Some copies are still missing or mixed, which must show in the error.
    assert found > 1 - 1e-6 or float(svd.error) > 1e-2


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_refinement_resolves_what_float32_cannot(shape):
    spectrum = slow()
    spectrum[3] = spectrum[4] + 2e-7
    w = np.asarray(matrix(*shape, spectrum)[0], np.float32)
    u, _, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    first = run("gram", w, guard=16)
    better = refine(jnp.asarray(w), first, 8)
    assert {x.dtype for x in jax.tree.leaves(better)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert float(first.error) > 0.1
    assert turned(better, u, vt.T, 8).max() < float(better.error) < 1e-2
    assert turned(better, u, vt.T, 8).max() < 1e-3 * turned(first, u, vt.T, 8).max() + 1e-6


# --- choice of kernels, and redoing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rank", "platform", "wanted"),
    [
        ((576, 1536), 320, "cpu", "gram"),
        ((2048, 8192), 320, "cpu", "krylov"),
        ((8192, 2048), 320, "cpu", "krylov"),
        ((4096, 4096), 320, "cpu", "krylov"),
        ((4096, 4096), 2048, "cpu", "gram"),
        ((1024, 4096), 16, "cpu", "gram"),
        ((1024, 4096), 16, "gpu", "krylov"),
        ((576, 1536), 320, "tpu", "gram"),
        ((4096, 14336), 320, "tpu", "krylov"),
    ],
)
def test_the_kernel_follows_shape_rank_and_platform(shape, rank, platform, wanted):
    assert choose_kernel(shape, rank, platform) == wanted


@pytest.mark.parametrize("kernel", ["full", "krylov"])
def test_every_kernel_gives_accurate_vectors_through_decompose(kernel):
    w, u, v = matrix(500, 480, slow(480))
    svd, used = decompose(jnp.asarray(w, jnp.float32)[None], 4, kernel=kernel)
    assert krylov_columns(4, guard=GUARD) < 480
    assert used[0].startswith(kernel)
    assert float(svd.error[0]) <= 1e-2
    assert svd.u.shape == (1, 500, 4)
    assert turned(jax.tree.map(lambda x: x[0], svd), u, v, 4).max() < 1e-2


def test_krylov_without_room_for_its_subspace_is_reported_as_gram():
    w, _, _ = matrix(48, 32, slow(32))
    assert decompose(jnp.asarray(w, jnp.float32)[None], 8, kernel="krylov")[1] == ("gram in float64",)


@pytest.mark.parametrize(("misses", "wanted"), [(1, "krylov, deeper"), (2, "gram"), (3, "full")])
def test_stronger_kernels_are_tried_in_turn(monkeypatch, misses, wanted):
    monkeypatch.setattr(choose, "_fits", lambda *_: True)
    # Of a shape that no other test has: programs are compiled with the kernels as they are here.
    w, u, v = matrix(60 + misses, 41, slow(41))
    nothing = np.linalg.qr(np.random.default_rng(0).normal(size=(41, 3)))[0]
    monkeypatch.setattr(choose, "GUARD", 1)

    def broken(w, rank, **options):
        svd = gram_svd(w, rank, **options)
        # Arbitrary vectors, which refinement cannot repair.
        return svd.replace(v=jnp.asarray(nothing, jnp.float32), error=jnp.full((), 9.0))

    for name in ("krylov", "krylov, deeper", "gram")[:misses]:
        monkeypatch.setitem(choose.KERNELS, name, broken)
    svd, used = decompose(jnp.asarray(np.stack([w, w]), jnp.float32), 2, kernel="krylov")
    assert used == (wanted, wanted)
    assert turned(jax.tree.map(lambda x: x[1], svd), u, v, 2).max() < 1e-2


def test_the_best_result_is_returned_if_no_kernel_meets_the_tolerance():
    equal, nan = np.eye(24)[:, :20] * 3, np.full((24, 20), np.nan)
    svd, used = decompose(jnp.asarray(np.stack([equal, nan]), jnp.float32), 6)
    assert float(svd.error[0]) > 1
    assert np.isnan(svd.error[1])
    assert used[1] == "full in float64"
    np.testing.assert_allclose(np.asarray(svd.u[0]).T @ np.asarray(svd.u[0]), np.eye(6), atol=1e-5)


def test_describe_kernels_counts_the_kernels():
    assert describe_kernels(["gram", "gram in float64", "gram"]) == "gram 2, gram in float64 1"
    assert set(KERNELS) == {"full", "gram", "krylov", "krylov, deeper"}


@pytest.mark.full
@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(SMALL)), st.floats(0.1, 1.5), st.integers(0, 2**32 - 1))
def test_no_kernel_underestimates_its_error(name, power, seed):
    spectrum = np.sort(np.random.default_rng(seed).uniform(0.2, 1, size=64) ** power)[::-1]
    w, u, v = matrix(96, 64, spectrum, seed)
    svd = run(name, w)
    # The error is a first-order estimate; above a radian it only says that nothing is known.
    assert turned(svd, u, v, 8).max() <= 2 * float(svd.error)
