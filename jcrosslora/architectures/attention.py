"""Causal grouped-query attention with sliding windows, soft caps and rotary positions; its softmax is float32."""

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.architectures.ops import einsum, soft_cap
from jcrosslora.architectures.ropes import Growth, Rope

NO_WINDOW = 1 << 30


def attention_mask(
    query_positions: jax.Array, key_positions: jax.Array, window: jax.Array, *, chunked: bool = False
) -> jax.Array:
    """Return which keys each query attends to, bool (B, T, S).

    Args:
        query_positions: int32 (B, T).
        key_positions: int32 (B, S), negative for padding and free slots.
        window: int32 scalar, number of visible positions, the query's own included.
        chunked: whether a query sees the positions of its own chunk of that number, instead of the last ones.
    """
    queries, keys = query_positions[:, :, None], key_positions[:, None, :]
    near = queries // window == keys // window if chunked else queries - keys < window
    return (keys >= 0) & (keys <= queries) & near


def attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    scale: float,
    cap: float | None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Apply softmax attention.

    Args:
        queries: (B, T, heads, D).
        keys: (B, kv_heads, S, D).
        values: (B, kv_heads, S, E).
        mask: bool (B, T, S), from `attention_mask`.
        scale: factor on the scores.
        cap: soft cap of the scores, or None.
        sinks: float32 (heads,), the score of attending to nothing; None without that choice.

    Returns:
        (B, T, heads * E) in the dtype of the queries; the products are of the dtype of the keys. A query that attends
        to nothing gets the mean of all values.
    """
    batch, length, heads, size = queries.shape
    groups = heads // keys.shape[1]
    # The query heads of one key-value head become rows of one matrix.
    grouped = queries.reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, -1, groups * length, size).astype(keys.dtype)
    scores = einsum("bktd,bksd->bkts", rows, keys) * scale
    scores = soft_cap(scores, cap).reshape(batch, -1, groups, length, keys.shape[2])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = _softmax(scores, sinks).astype(values.dtype)
    mixed = einsum("bkts,bksd->bktd", weights.reshape(batch, -1, groups * length, keys.shape[2]), values)
    mixed = mixed.reshape(batch, -1, groups, length, values.shape[-1]).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * values.shape[-1]).astype(queries.dtype)


def _softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Return the weights of scores (B, kv_heads, groups, T, S); those of a head with a sink sum to less than 1."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.reshape(scores.shape[1], scores.shape[2], 1, 1)
    largest = lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks))
    exponentials = jnp.exp(scores - largest)
    return exponentials / (jnp.sum(exponentials, axis=-1, keepdims=True) + jnp.exp(sinks - largest))


def rotations(ropes: tuple[Rope, ...], positions: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Return cosine and sine, float32 (2, B, T, pairs), for each rotary setting.

    Args:
        ropes: the different rotary settings of a model.
        positions: int32 (B, T).
        lengths: int32 (B,), tokens of the whole text of each sequence; None if the positions reach its end.
    """
    return tuple(_rotation(rope, positions, lengths) for rope in ropes)


def _rotation(rope: Rope, positions: jax.Array, lengths: jax.Array | None) -> jax.Array:
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.long_frequencies is not None:
        assert rope.switch is not None
        # Each sequence by itself. In a batch of transformers, the longest decides for all.
        reach = jnp.max(positions, axis=-1) + 1 if lengths is None else lengths
        long = reach[:, None, None] > rope.switch
        frequencies = jnp.where(long, jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.amplitude


def growths(ropes: tuple[Rope, ...], positions: jax.Array) -> tuple[jax.Array, ...] | None:
    """Return the factor on the queries, float32 (B, T), for each rotary setting; None if no queries grow.

    Args:
        ropes: the different rotary settings of a model.
        positions: int32 (B, T).
    """
    if all(rope.growth is None for rope in ropes):
        return None
    return tuple(_growth(rope.growth or Growth(0.0, 1), positions) for rope in ropes)


def _growth(growth: Growth, positions: jax.Array) -> jax.Array:
    return 1 + growth.beta * jnp.log1p(((positions + growth.first) // growth.length).astype(jnp.float32))


def apply_rope(x: jax.Array, rotation: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate pairs of features of every head; features from 2 * pairs on stay unchanged.

    Args:
        x: (B, T, heads, D).
        rotation: float32 (2, B, T, pairs), cosine and sine.
        interleaved: whether the features of a pair are 2i and 2i + 1, instead of i and i + pairs.
    """
    pairs = rotation.shape[-1]
    cosine, sine = rotation[:, :, :, None, :]
    places = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    if not interleaved:
        places = slice(0, pairs), slice(pairs, 2 * pairs)
    first, second = (x[..., place].astype(jnp.float32) for place in places)
    turned = first * cosine - second * sine, second * cosine + first * sine
    if interleaved:
        rotated = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * pairs)
    else:
        rotated = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)
