"""The matrix product that every decomposition and solve here depends on."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` at full float32 precision.

    TF32 on a GPU and bfloat16 passes on a TPU are the default there; a single such product turns singular
    vectors by more than the gaps between them allow, so the precision is always asked for.
    """
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
