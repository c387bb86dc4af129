"""Ridge regression of full and of reduced rank, and matrix powers, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jcrosslora.linalg import psd_power, reduced_rank_ridge, ridge

PENALTY = 0.05


def moments(rows=80, width=12, out=7, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * np.geomspace(1, 10, width)
    y = x @ rng.normal(size=(width, out)) + rng.normal(size=(rows, out))
    return x, y, jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(x.T @ y, jnp.float32)


def loss(x, y, w):
    return np.sum((x @ w - y) ** 2) + PENALTY * np.mean(np.sum(x**2, axis=0)) * np.sum(w**2)


def test_ridge_is_the_least_squares_solution_of_the_padded_problem():
    x, y, gram, cross = moments()
    root = np.sqrt(PENALTY * np.mean(np.diagonal(x.T @ x)))
    padded = np.concatenate([x, root * np.eye(12)]), np.concatenate([y, np.zeros((12, 7))])
    want = np.linalg.lstsq(*padded)[0]
    np.testing.assert_allclose(ridge(gram, cross, PENALTY), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_reduced_rank_ridge_is_optimal_for_its_rank(rank):
    x, y, gram, cross = moments()
    left, right = (
        np.asarray(f, np.float64) for f in jax.jit(reduced_rank_ridge, static_argnums=2)(gram, cross, rank, PENALTY)
    )
    np.testing.assert_allclose(right.T @ right, np.eye(rank), atol=1e-5)
    best = loss(x, y, left @ right.T)
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            other = (left + size * rng.normal(size=left.shape)) @ (right + size * rng.normal(size=right.shape)).T
            assert loss(x, y, other) > best * (1 - 1e-6)
    # The truncated SVD of the full-rank solution is another map, and a worse one.
    u, s, vt = np.linalg.svd(np.asarray(ridge(gram, cross, PENALTY), np.float64), full_matrices=False)
    assert loss(x, y, (u[:, :rank] * s[:rank]) @ vt[:rank]) >= best * (1 - 1e-5)


def test_zero_moments_give_zero_maps():
    nothing = jnp.zeros((5, 5)), jnp.zeros((5, 3))
    assert not np.asarray(ridge(*nothing, PENALTY)).any()
    left, right = reduced_rank_ridge(*nothing, 2, PENALTY)
    assert not np.asarray(left).any()
    assert np.isfinite(np.asarray(right)).all()


@pytest.mark.parametrize("power", [-0.5, -0.25, 0.5, 1.0])
def test_psd_power_equals_the_matrix_power(power):
    x, *_ = moments()
    gram = x.T @ x
    values, vectors = np.linalg.eigh(gram)
    want = (vectors * values**power) @ vectors.T
    found, raised = psd_power(jnp.asarray(gram, jnp.float32), power)
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(raised, values, rtol=1e-3)


def test_negative_powers_stay_bounded_in_unused_directions():
    x = moments()[0][:, :3] @ np.random.default_rng(2).normal(size=(3, 12))
    found, raised = psd_power(jnp.asarray(x.T @ x, jnp.float32), -0.5)
    assert np.isfinite(np.asarray(found)).all()
    assert float(raised[0]) >= 1e-7 * float(raised[-1])
    assert np.isfinite(np.asarray(psd_power(jnp.zeros((4, 4)), -0.5)[0])).all()
