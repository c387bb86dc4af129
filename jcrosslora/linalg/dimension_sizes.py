"""The sizes by which dimensions are divided, so that a few massive ones do not rule what is fitted on all."""

import chex
import jax
import jax.numpy as jnp

# Of the median size. A smaller dimension is dead, or nearly never used: divided by its own size, what little the probes
# show of it would count as much as all of another one, and a map that divides by it would have no bound.
FLOOR = 1e-2


def dimension_sizes(squares: jax.Array) -> jax.Array:
    """The root of each dimension's sum of squares (M,), at least `FLOOR` times the median; ones where all are zero.

    The mean takes the place of the median where more than half are zero.
    """
    chex.assert_rank(squares, 1)
    sizes = jnp.sqrt(squares)
    middle = jnp.median(sizes)
    middle = jnp.where(middle > 0, middle, jnp.mean(sizes))
    return jnp.where(middle > 0, jnp.maximum(sizes, FLOOR * middle), 1)
