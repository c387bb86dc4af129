"""Drawing a token from logits with one random number."""

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 512  # tokens; a vocabulary of 262,144 has as many blocks as a block has tokens


def draw(key: jax.Array, scores: jax.Array, temperature: jax.Array) -> jax.Array:
    """int32 (B,): tokens drawn from softmax(scores / temperature), or the likeliest where the temperature is 0.

    The cumulative distribution is inverted, first over blocks of tokens, then inside one: `jax.random.categorical`
    needs a random number and two logarithms for every token, which on a CPU costs more than the head itself.

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
    block = _first_beyond(ends, sums, level)
    start = jnp.take_along_axis(ends - sums, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + _first_beyond(jnp.cumsum(inside, axis=-1), inside, level - start)


def _first_beyond(ends: jax.Array, weights: jax.Array, level: jax.Array) -> jax.Array:
    beyond = ends > level[:, None]
    # Rounding can leave none beyond; then the heaviest, which at least has a weight.
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), _likeliest(weights)).astype(jnp.int32)


def _likeliest(scores: jax.Array) -> jax.Array:
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)
