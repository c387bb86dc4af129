"""Powers of a symmetric positive semidefinite matrix."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.dot import dot


def psd_power(matrix: jax.Array, power: float) -> tuple[jax.Array, jax.Array]:
    """Compute matrix^power by eigenvectors, with eigenvalues raised to at least the level of float32 rounding.

    An eigenvalue below eps times the side times the largest is noise and may be negative; its negative power would
    outweigh all others.

    Args:
        matrix: (M, M).
        power: any real number.

    Returns:
        The power (M, M), and the eigenvalues (M,) after raising, ascending.
    """
    chex.assert_rank(matrix, 2)
    values, vectors = jnp.linalg.eigh(matrix)
    noise = jnp.finfo(values.dtype).eps * values.shape[0] * values[-1]
    values = jnp.maximum(values, jnp.where(noise > 0, noise, 1))
    return dot(vectors * values**power, vectors.T), values
