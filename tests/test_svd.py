"""Truncated SVD: identities on matrices with a prescribed spectrum, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jcrosslora.linalg import decompose, full_svd, gram_svd

ROUTES = [full_svd, gram_svd]


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
    # Vectors up to their joint sign: the products u_i v_i' are unique.
    products = np.einsum("or,ir->roi", svd.u, svd.v)
    np.testing.assert_allclose(products, np.einsum("or,ir->roi", u, v)[:rank], atol=2e-3)
    np.testing.assert_allclose(svd.energy, (spectrum[:rank] ** 2).sum() / (spectrum**2).sum(), rtol=1e-5)
    assert int(svd.numerical_rank) == rank
    np.testing.assert_allclose(svd.condition, spectrum[0] / spectrum[rank - 1], rtol=1e-3)


def test_gap_says_how_well_the_cut_is_defined():
    spectrum = np.array([4.0, 3.0, 2.0, 1.0, 0.5])
    w, _, _ = matrix(12, 9, spectrum)
    assert float(full_svd(jnp.asarray(w, jnp.float32), 3).gap) == pytest.approx(0.5, abs=1e-4)
    assert float(full_svd(jnp.asarray(w, jnp.float32), 5).gap) == pytest.approx(1.0, abs=1e-4)


def test_error_grows_with_closeness_of_neighbours_and_is_an_honest_bound():
    wide, narrow = np.array([5.0, 4.0, 3.0, 2.0, 1.0]), np.array([5.0, 4.0, 4.0 - 1e-4, 2.0, 1.0])
    for spectrum in (wide, narrow):
        w, u, _ = matrix(60, 30, spectrum)
        svd = gram_svd(jnp.asarray(w, jnp.float32), 4)
        ours, exact = np.asarray(svd.u, np.float64), u[:, :4]
        beside = ours - exact * np.sum(ours * exact, axis=0)  # the part of each vector that is not along the exact one
        assert np.linalg.norm(beside, axis=0).max() <= 10 * float(svd.error)
    errors = [float(gram_svd(jnp.asarray(matrix(60, 30, s)[0], jnp.float32), 4).error) for s in (wide, narrow)]
    assert errors[1] > 100 * errors[0]


def test_close_neighbours_do_not_matter_where_only_the_subspace_is_used():
    w, u, _ = matrix(60, 30, [5.0, 4.0, 4.0, 2.0, 1.0])
    svd = gram_svd(jnp.asarray(w, jnp.float32), 3, vectors=False)
    assert float(svd.error) < 1e-5
    np.testing.assert_allclose(np.asarray(svd.u) @ np.asarray(svd.u).T, u[:, :3] @ u[:, :3].T, atol=1e-4)


def test_a_matrix_that_the_gram_route_cannot_resolve_is_redone():
    easy, _, _ = matrix(48, 32, np.linspace(10, 1, 32))
    hard, u, _ = matrix(48, 32, np.r_[np.linspace(10, 1, 29), 1e-3, 5e-4, 2e-4], seed=1)
    stack = jnp.asarray(np.stack([easy, hard]), jnp.float32)
    svd, redone = decompose(stack, 32)
    assert redone == 1
    for place in (-3, -2, -1):
        assert abs(float(np.asarray(svd.u)[1, :, place] @ u[:, place])) > 0.999


def test_directions_of_zero_singular_value_are_left_out():
    w, u, v = matrix(20, 12, [3.0, 2.0, 1.0])
    svd, _ = decompose(jnp.asarray(w, jnp.float32)[None], 8)
    assert int(svd.numerical_rank[0]) == 3
    np.testing.assert_allclose(np.asarray(svd.u[0]) @ np.asarray(svd.u[0]).T, u @ u.T, atol=1e-4)
    np.testing.assert_allclose(np.asarray(svd.v[0]) @ np.asarray(svd.v[0]).T, v @ v.T, atol=1e-4)
    assert not np.asarray(svd.u[0])[:, 3:].any()


def test_a_zero_matrix_has_no_directions_and_no_nan():
    svd, _ = decompose(jnp.zeros((1, 6, 4)), 3)
    assert int(svd.numerical_rank[0]) == 0
    for leaf in (svd.u, svd.v, svd.s, svd.energy, svd.gap, svd.condition):
        assert not np.asarray(leaf).any()


@pytest.mark.parametrize("size", [1e-15, 1e12])
def test_the_scale_of_the_weights_does_not_matter(size):
    w, u, _ = matrix(20, 12, np.linspace(3, 1, 12))
    svd, _ = decompose(jnp.asarray(w * size, jnp.float32)[None], 5)
    np.testing.assert_allclose(np.abs(np.sum(np.asarray(svd.u[0]) * u[:, :5], axis=0)), 1, atol=1e-4)
    np.testing.assert_allclose(svd.s[0], np.linspace(3, 1, 12)[:5] * size, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_projections_agree_with_float64_on_any_shape(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    w = np.random.default_rng(rows * 10 + columns).normal(size=(rows, columns))
    svd, _ = decompose(jnp.asarray(w, jnp.float32)[None], rank)
    u, s, vt = np.linalg.svd(w)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    ours = (np.asarray(svd.u[0]) * np.asarray(svd.s[0])) @ np.asarray(svd.v[0]).T
    np.testing.assert_allclose(ours, best, atol=1e-3)
