"""Draw a token from logits with one random number."""

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 512  # tokens; near the square root of a vocabulary of 262,144, which minimises the work


def draw(key: jax.Array, scores: jax.Array, temperature: jax.Array) -> jax.Array:
    """Draw tokens int32 (B,) from softmax(scores / temperature); at temperature 0 take the likeliest.

    Inverts the cumulative distribution, first over blocks of tokens, then inside one. `jax.random.categorical` needs a
    random number and two logarithms for every token, which on a CPU costs more than the output head.

    Args:
        key: from `jax.random.key`.
        scores: float32 (B, V).
        temperature: float32 scalar.
    """
    return lax.cond(temperature > 0, _invert, lambda _, scores, __: _likeliest(scores), key, scores, temperature)


def _invert(key: jax.Array, scores: jax.Array, temperature: jax.Array) -> jax.Array:
    warm = (scores - jnp.max(scores, axis=-1, keepdims=True)) / temperature
    padded = jnp.pad(warm, ((0, 0), (0, -scores.shape[1] % _BLOCK)), constant_values=-jnp.inf)
    weights = jnp.exp(padded).reshape(scores.shape[0], -1, _BLOCK)
    sums = jnp.sum(weights, axis=-1)
    ends = jnp.cumsum(sums, axis=-1)
    level = jax.random.uniform(key, (scores.shape[0],)) * ends[:, -1]
    block = _first_above(ends, sums, level)
    start = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_above(jnp.cumsum(inside, axis=-1), inside, level - start)


def _first_above(ends: jax.Array, weights: jax.Array, level: jax.Array) -> jax.Array:
    above = ends > level[:, None]
    # Rounding can leave none above the level; take the heaviest then, whose weight is not zero.
    return jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), _likeliest(weights)).astype(jnp.int32)


def _likeliest(scores: jax.Array) -> jax.Array:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)
