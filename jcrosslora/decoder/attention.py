"""Causal grouped-query attention with sliding windows and soft caps; scores and softmax are float32."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.ops import einsum, soft_cap

NO_WINDOW = 1 << 30


def attention_mask(query_positions: jax.Array, key_positions: jax.Array, window: jax.Array) -> jax.Array:
    """Return which keys each query attends to, bool (B, T, S).

    Args:
        query_positions: int32 (B, T).
        key_positions: int32 (B, S), negative for padding and free slots.
        window: int32 scalar, number of visible positions, the query's own included.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    return (key_positions[:, None, :] >= 0) & (distance >= 0) & (distance < window)


def attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array, scale: float, cap: float | None
) -> jax.Array:
    """Apply softmax attention.

    Args:
        queries: (B, T, heads, D).
        keys: (B, kv_heads, S, D).
        values: (B, kv_heads, S, D).
        mask: bool (B, T, S), from `attention_mask`.
        scale: factor on the scores.
        cap: soft cap of the scores, or None.

    Returns:
        (B, T, heads * D) in the dtype of the values. A query that attends to nothing gets the mean of all values.
    """
    batch, length, heads, size = queries.shape
    groups = heads // keys.shape[1]
    # The query heads of one key-value head become rows of one matrix.
    grouped = queries.reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, -1, groups * length, size)
    scores = einsum("bktd,bksd->bkts", rows, keys) * scale
    scores = soft_cap(scores, cap).reshape(batch, -1, groups, length, keys.shape[2])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = einsum("bkts,bksd->bktd", weights.reshape(batch, -1, groups * length, keys.shape[2]), values)
    mixed = mixed.reshape(batch, -1, groups, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * size).astype(values.dtype)
