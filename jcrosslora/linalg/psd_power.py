"""Powers of a symmetric positive semidefinite matrix."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.dot import dot


def psd_power(matrix: jax.Array, power: float) -> tuple[jax.Array, jax.Array]:
    """matrix^power by its eigenvectors; eigenvalues below the rounding of float32 are raised to it.

    Below eps times the side times the largest an eigenvalue is noise, and may be negative; a negative power of it
    would outweigh all the others.

    Args:
        matrix: (M, M).
        power: any real number.

    Returns:
        The power (M, M), and the raised eigenvalues (M,), ascending.
    """
    chex.assert_rank(matrix, 2)
    values, vectors = jnp.linalg.eigh(matrix)
    noise = jnp.finfo(values.dtype).eps * values.shape[0] * values[-1]
    values = jnp.maximum(values, jnp.where(noise > 0, noise, 1))
    return dot(vectors * values**power, vectors.T), values
