"""Sizes of dimensions, to normalise by, so that a few massive dimensions do not dominate a fit over all."""

import chex
import jax
import jax.numpy as jnp

# Share of the median size. A smaller dimension is dead or almost unused: divided by its own size, its few small values
# would weigh as much as a whole other dimension, and a map that divides by it would be unbounded.
FLOOR = 1e-2


def dimension_sizes(squares: jax.Array) -> jax.Array:
    """Return the root of each dimension's sum of squares (M,), at least `FLOOR` times the median.

    If more than half of the sizes are zero, the mean replaces the median; if all are, the sizes are ones.
    """
    chex.assert_rank(squares, 1)
    sizes = jnp.sqrt(squares)
    middle = jnp.median(sizes)
    middle = jnp.where(middle > 0, middle, jnp.mean(sizes))
    return jnp.where(middle > 0, jnp.maximum(sizes, FLOOR * middle), 1)
