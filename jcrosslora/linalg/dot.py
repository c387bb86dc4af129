"""The matrix product of all decompositions and solves."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply `a @ b` at full float32 precision.

    The defaults are TF32 on a GPU and bfloat16 passes on a TPU. One product of that precision turns singular vectors
    by more than the gaps in the spectrum allow, so the precision is always explicit.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
