"""What layers keep of the tokens before: keys and values of attention, and the states of recurrent blocks."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jcrosslora.architectures.ops import from_bits

EMPTY = -1  # position of a slot without a token


@flax.struct.dataclass
class KeysValues:
    """Keys and values of one kind of attention.

    Attributes:
        keys: (L, B, kv_heads, S, D), with rotary positions applied; float32, bfloat16, or its bits as uint16, which a
            CPU copies faster.
        values: (L, B, kv_heads, S, D), of latent attention with a D of their own.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def form(cls, shape: tuple[int, ...], sizes: tuple[int, int], dtype: DTypeLike) -> "KeysValues":
        """Return the form of those of one layer, (B, kv_heads, S) and the sizes D of keys and of values."""
        return jax.eval_shape(lambda: cls(*(jnp.zeros((*shape, size), dtype) for size in sizes)))


@flax.struct.dataclass
class KVCache:
    """What the layers keep of B texts in S slots, filled from the first on, padding included.

    Attributes:
        positions: int32 (B, S), position of the token in a slot, -1 for padding and free slots.
        filled: int32 scalar, slots in use; the same for all sequences.
        states: kind of a state, see `Block.states` -> its arrays (L, B, ...) of the L layers with it, in order. A
            layer's own is at `LayerWeights.places`.
        last_only: static, whether L is 1, for the last layer with keys alone, see `last_keys`.
    """

    positions: jax.Array
    filled: jax.Array
    states: dict[str, Any]
    last_only: bool = flax.struct.field(pytree_node=False, default=False)

    def with_state(self, kind: str, state: Any) -> "KVCache":
        """Return the cache with other arrays of one kind."""
        return self.replace(states={**self.states, kind: state})  # pyright: ignore[reportAttributeAccessIssue]


def of_sequences(cache: KVCache, chosen: jax.Array) -> KVCache:
    """Return the cache of the sequences `chosen`, int32 (B,), any of them several times."""
    found = jax.tree.map(lambda x: x[:, chosen], cache.states)
    return cache.replace(  # pyright: ignore[reportAttributeAccessIssue]
        positions=cache.positions[chosen], states=found
    )


def append_positions(cache: KVCache, positions: jax.Array) -> KVCache:
    """Add the positions (B, T) of new tokens, -1 for padding, before their keys and values."""
    added = lax.dynamic_update_slice(cache.positions, positions, (jnp.zeros((), jnp.int32), cache.filled))
    return cache.replace(positions=added)  # pyright: ignore[reportAttributeAccessIssue]


def append_layer(
    cache: KVCache, kind: str, place: jax.Array, keys: jax.Array, values: jax.Array
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Write the keys and values (B, kv_heads, T, D) of a layer after the filled slots.

    Args:
        cache: of the tokens before.
        kind: of the layer's state.
        place: int32 scalar, where the layer is among those of this kind.
        keys: of the new tokens.
        values: of the new tokens.

    Returns:
        The new cache, and all keys and all values of the layer, (B, kv_heads, S, D).
    """
    if cache.last_only:
        kept = KeysValues(keys[None], values[None]) if kind in cache.states else None
        return (cache if kept is None else cache.with_state(kind, kept)), keys, values
    zero = jnp.zeros((), jnp.int32)
    at, old = (place, zero, zero, cache.filled, zero), cache.states[kind]
    all_keys = lax.dynamic_update_slice(old.keys, _stored(keys, old.keys.dtype)[None], at)
    all_values = lax.dynamic_update_slice(old.values, _stored(values, old.values.dtype)[None], at)
    return (
        cache.with_state(kind, KeysValues(all_keys, all_values)),
        from_bits(lax.dynamic_index_in_dim(all_keys, place, keepdims=False)),
        from_bits(lax.dynamic_index_in_dim(all_values, place, keepdims=False)),
    )


def last_of_kind(cache: KVCache, kind: str) -> tuple[jax.Array, jax.Array]:
    """Return all keys and values (B, kv_heads, S, D) of the last layer of a kind, see `append_layer`."""
    state = cache.states[kind]
    return from_bits(state.keys[-1]), from_bits(state.values[-1])


def _stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
