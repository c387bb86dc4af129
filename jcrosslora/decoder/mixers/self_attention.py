"""Softmax attention of a layer: from the normed stream to the output of o_proj."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.attention import (
    GLOBAL,
    KVCache,
    append_layer,
    apply_rope,
    attention,
    attention_mask,
    shared_keys,
)
from jcrosslora.decoder.layer import Context, LayerCapture, LayerWeights, apply_norm, of_layer, run_module
from jcrosslora.decoder.ops import rms_norm
from jcrosslora.decoder.settings import DecoderSettings


def self_attention(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    normed: jax.Array,
    cache: KVCache | None,
    capture: LayerCapture,
) -> tuple[jax.Array, KVCache | None]:
    """Run the attention of a layer on the normed stream (B, T, H).

    Returns:
        (B, T, H), the output of o_proj, and the cache with the layer's keys and values.
    """
    own = _kind(layer)
    queries, gate = _queries(settings, layer, normed, capture)
    keys = run_module(f"{own}k_proj", layer, normed, capture)
    # In some models the keys, before their norm, are the values.
    values = run_module(f"{own}v_proj", layer, normed, capture) if f"{own}v_proj" in layer.weights else keys
    rotation = of_layer(settings, layer, context.rotations)
    queries = _placed(settings, layer, f"{own}q", queries, rotation)
    keys = _placed(settings, layer, f"{own}k", keys, rotation).swapaxes(1, 2)
    values = _split_heads(values, settings, layer)
    if settings.value_norm:
        values = rms_norm(values, jnp.ones(values.shape[-1]), settings.eps)
    values = values.swapaxes(1, 2)
    queries = grown(settings, layer, context, queries)
    mixed, cache = attend(settings, layer, context, queries, keys, values, cache)
    mixed = mixed if gate is None else mixed * jax.nn.sigmoid(gate)
    return run_module(f"{own}o_proj", layer, mixed, capture), cache


def kv_shared_attention(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    normed: jax.Array,
    cache: KVCache | None,
    capture: LayerCapture,
) -> tuple[jax.Array, KVCache | None]:
    """Run the attention of a layer to the keys and values of the last layer of its kind that has any.

    Returns:
        (B, T, H), the output of o_proj, and the cache as it is.
    """
    assert cache is not None
    own = _kind(layer)
    queries = run_module(f"{own}kv_shared_q_proj", layer, normed, capture)
    queries = _placed(settings, layer, f"{own}q", queries, of_layer(settings, layer, context.rotations))
    mixed = _attended(settings, layer, context, queries, *shared_keys(cache, own))
    return run_module(f"{own}o_proj", layer, mixed, capture), cache


def grown(settings: DecoderSettings, layer: LayerWeights, context: Context, queries: jax.Array) -> jax.Array:
    """Multiply queries (B, T, heads, D) by the factor of their positions; return them where they do not grow."""
    if context.growths is None:
        return queries
    growth = of_layer(settings, layer, context.growths)[:, :, None, None]
    return (queries.astype(jnp.float32) * growth).astype(queries.dtype)


def attend(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cache: KVCache | None,
) -> tuple[jax.Array, KVCache | None]:
    """Let queries (B, T, heads, D) attend to keys and values (B, kv_heads, T, D), and to those in the cache.

    Returns:
        (B, T, heads * D) of the values, and the cache with these keys and values.
    """
    if cache is not None:
        cache, keys, values = append_layer(cache, layer.place, keys, values, _kind(layer))
    return _attended(settings, layer, context, queries, keys, values), cache


def _attended(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
) -> jax.Array:
    mask = attention_mask(
        context.query_positions, context.key_positions, layer.window, chunked=settings.chunked_windows
    )
    scale, cap, sinks = settings.attn_scale, settings.attn_soft_cap, layer.tensors.get("sinks")
    return attention(queries, keys, values, mask, scale, cap, sinks)


def _kind(layer: LayerWeights) -> str:
    """Return what stands in front of the names of a layer's modules and norms."""
    return GLOBAL if layer.parts.mixer.startswith(GLOBAL) else ""


def _queries(
    settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture
) -> tuple[jax.Array, jax.Array | None]:
    """Return queries and, in gated attention, the gate on what they get, (B, T, heads * D) each."""
    if "qg_proj" not in layer.weights:
        return run_module(f"{_kind(layer)}q_proj", layer, normed, capture), None
    both = run_module("qg_proj", layer, normed, capture)
    queries, gate = jnp.split(both.reshape(*both.shape[:2], -1, 2 * settings.head_dim), 2, axis=-1)
    return queries.reshape(*both.shape[:2], -1), gate.reshape(*both.shape[:2], -1)


def _placed(settings: DecoderSettings, layer: LayerWeights, norm: str, x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Split queries or keys into heads, normalise them and apply their positions."""
    if settings.qk_norms == "whole":
        x = apply_norm(settings, layer, norm, x)
    x = _split_heads(x, settings, layer)
    if settings.qk_norms == "head":
        x = apply_norm(settings, layer, norm, x)
    x = apply_rope(x, rotation, interleaved=settings.interleaved)
    if settings.qk_norms == "unit":
        return _unit(settings, layer, x)
    return apply_norm(settings, layer, norm, x) if settings.qk_norms == "rotated" else x


def _unit(settings: DecoderSettings, layer: LayerWeights, x: jax.Array) -> jax.Array:
    """Normalise heads (B, T, heads, D) without a gain; return x in a layer without positions."""
    turns = [settings.ropes[index].turns for index in settings.ropes_of(layer.parts.mixer)]
    normed = rms_norm(x, jnp.ones(x.shape[-1]), settings.eps)
    if all(turns):
        return normed
    return jnp.where(jnp.asarray([rope.turns for rope in settings.ropes])[layer.rope], normed, x)


def _split_heads(x: jax.Array, settings: DecoderSettings, layer: LayerWeights) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, settings.heads_of(layer.parts.mixer).size)
