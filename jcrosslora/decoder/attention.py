"""Causal grouped-query attention with sliding windows, soft caps, rotary positions, and a cache of keys and values.

Scores and softmax are float32.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jcrosslora.decoder.mixers.state import MixerState, init_state
from jcrosslora.decoder.ops import einsum, from_bits, soft_cap
from jcrosslora.decoder.rope_scaling import Growth, Rope
from jcrosslora.decoder.settings import DecoderSettings

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


# Mixers with keys and values.
KEYED = ("attention", "attention, then norm", "latent_attention", "direct_latent_attention", "attention and mamba")
GLOBAL = "global_"  # in front of the names of what layers with heads of their own have
EMPTY = -1  # position of a slot without a token


@flax.struct.dataclass
class KVCache:
    """Keys and values in S slots for each sequence, filled from the first on, padding included.

    Attributes:
        keys: (L, B, kv_heads, S, D) of the L layers with attention, with rotary positions applied; float32, bfloat16,
            or its bits as uint16, which a CPU copies faster.
        values: (L, B, kv_heads, S, D), of latent attention with a D of their own.
        positions: int32 (B, S), position of the token in a slot, -1 for padding and free slots.
        filled: int32 scalar, slots in use; the same for all sequences.
        states: kind of a mixer beside attention -> what it keeps of the tokens before, arrays (L, B, ...) of the L
            layers that have it; a layer's own is at `LayerWeights.place`.
        global_keys: keys of the L layers whose attention has the heads of `DecoderSettings.global_heads`, or None.
        global_values: their values, or None.
        last_only: static, whether L is 1, for the last layer with keys alone, see `last_keys`.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    filled: jax.Array
    states: dict[str, MixerState] = flax.struct.field(default_factory=dict)
    global_keys: jax.Array | None = None
    global_values: jax.Array | None = None
    last_only: bool = flax.struct.field(pytree_node=False, default=False)


def last_keys(settings: DecoderSettings, x: jax.Array) -> KVCache | None:
    """Create what a pass over a whole stream x (B, T, H) hands from layer to layer; None where no layer needs it."""
    if not settings.shares_keys:
        return None
    cache = init_cache(settings, x.shape[0], x.shape[1], x.dtype)
    stacks = {name: getattr(cache, name) for name in ("keys", "values", "global_keys", "global_values")}
    one = {name: None if stack is None else jnp.zeros((1, *stack.shape[1:]), x.dtype) for name, stack in stacks.items()}
    return cache.replace(**one, last_only=True)  # pyright: ignore[reportAttributeAccessIssue]


def init_cache(settings: DecoderSettings, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """Create an empty cache for `batch` sequences of up to `length` tokens, padding included.

    Args:
        settings: of the model.
        batch: B.
        length: S.
        dtype: of keys and values.
    """
    mixer = settings.mixer
    with_state = 0 if mixer is None else sum(mixer.kind in parts.mixer for parts in settings.parts)
    latent, kv_heads, key, value = settings.latent, settings.kv_heads, settings.head_dim, settings.head_dim
    if latent is not None:
        kv_heads, key, value = settings.heads, latent.plain + latent.rotated, latent.value
    shape = (sum(parts.mixer in KEYED for parts in settings.parts), batch, kv_heads, length)
    own: dict[str, Any] = {}
    if (wide := settings.global_heads) is not None:
        count = len(settings.layers_with("global_k_proj"))
        own = {
            name: jnp.zeros((count, batch, wide.kv_heads, length, wide.size), dtype)
            for name in ("global_keys", "global_values")
        }
    return KVCache(
        keys=jnp.zeros((*shape, key), dtype),
        values=jnp.zeros((*shape, value), dtype),
        positions=jnp.full((batch, length), EMPTY, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        states={} if mixer is None or not with_state else {mixer.kind: init_state(mixer, with_state, batch)},
        **own,
    )


def of_sequences(cache: KVCache, chosen: jax.Array) -> KVCache:
    """Return the cache of the sequences `chosen`, int32 (B,), any of them several times."""
    stacks = {name: getattr(cache, name) for name in ("keys", "values", "states", "global_keys", "global_values")}
    found = jax.tree.map(lambda x: x[:, chosen], stacks)
    return cache.replace(positions=cache.positions[chosen], **found)  # pyright: ignore[reportAttributeAccessIssue]


def append_positions(cache: KVCache, positions: jax.Array) -> KVCache:
    """Add the positions (B, T) of new tokens, -1 for padding, before their keys and values."""
    added = lax.dynamic_update_slice(cache.positions, positions, (jnp.zeros((), jnp.int32), cache.filled))
    return cache.replace(positions=added)  # pyright: ignore[reportAttributeAccessIssue]


def append_layer(
    cache: KVCache, layer: jax.Array, keys: jax.Array, values: jax.Array, kind: str = ""
) -> tuple[KVCache, jax.Array, jax.Array]:
    """Write the keys and values (B, kv_heads, T, D) of a layer after the filled slots.

    Args:
        cache: of the tokens before.
        layer: int32 scalar, its place among the layers of its kind.
        keys: of the new tokens.
        values: likewise.
        kind: `GLOBAL` for a layer with the heads of `DecoderSettings.global_heads`.

    Returns:
        The new cache, and all keys and all values of the layer, (B, kv_heads, S, D).
    """
    if cache.last_only:
        return _replaced(cache, kind, keys[None], values[None]), keys, values
    zero = jnp.zeros((), jnp.int32)
    place = (layer, zero, zero, cache.filled, zero)
    old_keys, old_values = getattr(cache, f"{kind}keys"), getattr(cache, f"{kind}values")
    all_keys = lax.dynamic_update_slice(old_keys, _stored(keys, old_keys.dtype)[None], place)
    all_values = lax.dynamic_update_slice(old_values, _stored(values, old_values.dtype)[None], place)
    return (
        _replaced(cache, kind, all_keys, all_values),
        from_bits(lax.dynamic_index_in_dim(all_keys, layer, keepdims=False)),
        from_bits(lax.dynamic_index_in_dim(all_values, layer, keepdims=False)),
    )


def shared_keys(cache: KVCache, kind: str = "") -> tuple[jax.Array, jax.Array]:
    """Return all keys and values (B, kv_heads, S, D) of the last layer of a kind that has any, see `append_layer`."""
    return from_bits(getattr(cache, f"{kind}keys")[-1]), from_bits(getattr(cache, f"{kind}values")[-1])


def _replaced(cache: KVCache, kind: str, keys: jax.Array, values: jax.Array) -> KVCache:
    found = {f"{kind}keys": keys, f"{kind}values": values}
    return cache.replace(**found)  # pyright: ignore[reportAttributeAccessIssue]


def _stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
