"""Matrix powers against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jcrosslora.linalg import psd_power


def inputs(rows=80, width=12):
    return np.random.default_rng(0).normal(size=(rows, width)) * np.geomspace(1, 10, width)


@pytest.mark.parametrize("power", [-0.5, -0.25, 0.5, 1.0])
def test_psd_power_equals_the_matrix_power(power):
    x = inputs()
    gram = x.T @ x
    values, vectors = np.linalg.eigh(gram)
    want = (vectors * values**power) @ vectors.T
    found, raised = psd_power(jnp.asarray(gram, jnp.float32), power)
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
    np.testing.assert_allclose(raised, values, rtol=1e-3)


def test_negative_powers_stay_bounded_in_unused_directions():
    x = inputs()[:, :3] @ np.random.default_rng(2).normal(size=(3, 12))
    found, raised = psd_power(jnp.asarray(x.T @ x, jnp.float32), -0.5)
    assert np.isfinite(np.asarray(found)).all()
    assert float(raised[0]) >= 1e-7 * float(raised[-1])
    assert np.isfinite(np.asarray(psd_power(jnp.zeros((4, 4)), -0.5)[0])).all()
