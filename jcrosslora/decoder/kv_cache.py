"""Keep the keys and values of past tokens."""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jcrosslora.decoder.settings import DecoderSettings

EMPTY = -1  # position of a slot without a token


@flax.struct.dataclass
class KVCache:
    """Keys and values in S slots for each sequence, filled from the first on, padding included.

    Attributes:
        keys: (L, B, kv_heads, S, D), with rotary positions applied.
        values: (L, B, kv_heads, S, D).
        positions: int32 (B, S), position of the token in a slot, -1 for padding and free slots.
        filled: int32 scalar, slots in use; the same for all sequences.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    filled: jax.Array


def init_cache(settings: DecoderSettings, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """Create an empty cache for `batch` sequences of up to `length` tokens, padding included.

    Args:
        settings: of the model.
        batch: B.
        length: S.
        dtype: of the residual stream, see `Params.stream_dtype`.
    """
    shape = (settings.layers, batch, settings.kv_heads, length, settings.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, length), EMPTY, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def append_positions(cache: KVCache, positions: jax.Array) -> KVCache:
    """Add the positions (B, T) of new tokens, -1 for padding, before their keys and values."""
    added = lax.dynamic_update_slice(cache.positions, positions, (jnp.zeros((), jnp.int32), cache.filled))
    return cache.replace(positions=added)  # pyright: ignore[reportAttributeAccessIssue]


def append_layer(
    cache: KVCache, layer: jax.Array, keys: jax.Array, values: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Write the keys and values (B, kv_heads, T, D) of a layer after the filled slots.

    Returns:
        The new cache, and all keys and all values of the layer, (B, kv_heads, S, D).
    """
    zero = jnp.zeros((), jnp.int32)
    place = (layer, zero, zero, cache.filled, zero)
    all_keys = lax.dynamic_update_slice(cache.keys, keys[None], place)
    all_values = lax.dynamic_update_slice(cache.values, values[None], place)
    return (
        cache.replace(keys=all_keys, values=all_values),  # pyright: ignore[reportAttributeAccessIssue]
        lax.dynamic_index_in_dim(all_keys, layer, keepdims=False),
        lax.dynamic_index_in_dim(all_values, layer, keepdims=False),
    )
