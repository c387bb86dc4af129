"""Factored maps and thin products against their dense forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from jcrosslora.linalg import complement, low_rank, product_energy, select


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(linear_map, size):
    return np.asarray(linear_map(jnp.eye(size)))


def test_low_rank_map_is_the_product_of_its_factors():
    left, right = normal(7, 3), normal(5, 3, seed=1)
    np.testing.assert_allclose(dense(low_rank(left, right), 5), left @ right.T, atol=1e-5)


def test_select_weights_the_selected_rows():
    chosen = select(jnp.array([2, 0, 2]), jnp.array([1.0, 0.0, 3.0]), 4)
    np.testing.assert_array_equal(dense(chosen, 4), [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 3, 0]])


def test_complement_is_the_product_of_both_complementary_projections():
    first, second = (np.linalg.qr(normal(9, 4, seed=seed))[0] for seed in (0, 1))
    want = (np.eye(9) - first @ first.T) @ (np.eye(9) - second @ second.T)
    np.testing.assert_allclose(dense(complement(jnp.asarray(first), jnp.asarray(second)), 9), want, atol=1e-5)


def test_a_map_refuses_an_argument_of_the_wrong_height():
    with pytest.raises(AssertionError):
        low_rank(normal(7, 3), normal(5, 3))(jnp.zeros((6, 2)))


def test_product_energy_is_the_squared_norm_of_the_product():
    b, a = normal(8, 3), normal(3, 6, seed=1)
    assert float(product_energy(b, a)) == pytest.approx(float(np.sum((b @ a) ** 2)), rel=1e-5)
