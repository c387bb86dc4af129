"""Apply a function to a few positions at a time, to limit memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def map_positions(
    function: Callable[..., Any], arrays: tuple[jax.Array, ...], shape: tuple[int, ...], chunk: int
) -> Any:
    """Apply a function to chunks of positions; the backward pass computes each chunk again.

    Args:
        function: of one tuple: (chunk, ...) of each array. It returns a tree of arrays (chunk,).
        arrays: each `shape` followed by its own features.
        shape: of the positions, e.g. (B, T).
        chunk: positions at a time, static.

    Returns:
        The tree of `function`, with leaves of `shape`.
    """
    count = math.prod(shape)
    size = min(chunk, count)
    padding = -count % size

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[len(shape) :])
        return jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    # A loop body has no common subexpressions to keep apart.
    found = lax.map(jax.checkpoint(function, prevent_cse=False), tuple(map(cut, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(shape), found)
