"""Causal attention of grouped heads, with windows and soft caps; scores and softmax in float32."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.ops import product, soft_cap

NO_WINDOW = 1 << 30


def visible(query_positions: jax.Array, key_positions: jax.Array, window: jax.Array) -> jax.Array:
    """Which key a query sees, bool (B, T, S).

    Args:
        query_positions: int32 (B, T).
        key_positions: int32 (B, S), negative for padding and free slots.
        window: int32 scalar, positions seen, the query's own included.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    return (key_positions[:, None, :] >= 0) & (distance >= 0) & (distance < window)


def attend(
    queries: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, scale: float, cap: float | None
) -> jax.Array:
    """Attention.

    Args:
        queries: (B, T, heads, D).
        keys: (B, kv_heads, S, D).
        values: (B, kv_heads, S, D).
        seen: bool (B, T, S).
        scale: factor on the scores.
        cap: their soft cap, or None.

    Returns:
        (B, T, heads * D) in the dtype of the values. A query that sees nothing gets the mean of all values.
    """
    batch, length, heads, size = queries.shape
    groups = heads // keys.shape[1]
    # The query heads that share a key head become rows of one matrix.
    grouped = queries.reshape(batch, length, -1, groups, size).transpose(0, 2, 3, 1, 4)
    rows = grouped.reshape(batch, -1, groups * length, size)
    scores = product("bktd,bksd->bkts", rows, keys) * scale
    scores = soft_cap(scores, cap).reshape(batch, -1, groups, length, keys.shape[2])
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    mixed = product("bkts,bksd->bktd", weights.reshape(batch, -1, groups * length, keys.shape[2]), values)
    mixed = mixed.reshape(batch, -1, groups, length, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * size).astype(values.dtype)
