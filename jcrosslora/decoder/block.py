"""One decoder layer, with captures of its inputs and outputs."""

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.decoder.adapters import StackedFactors, update
from jcrosslora.decoder.attention import KVCache, append_layer, apply_rope, attention, attention_mask
from jcrosslora.decoder.ops import ACTIVATIONS, layer_norm, linear, rms_norm
from jcrosslora.decoder.settings import DecoderSettings

# The place in a layer where the input of each role is read.
INPUT_SITES = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "o_proj": "attn_out_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "down_in",
}


@flax.struct.dataclass
class LayerCapture:
    """The inputs and outputs of one layer; under jit, those that nothing uses are neither computed nor kept.

    Attributes:
        layer: int32 scalar, index of the layer.
        inputs: site -> (B, T, I): "attn_in" of q, k and v, "attn_out_in" of o, "mlp_in" of gate and up, "down_in" of
            down (see `INPUT_SITES`).
        outputs: role -> (B, T, O), the module's output with bias and adapter, before any norm or rotary position.
        residual: (B, T, H), the residual stream after the layer.
    """

    layer: jax.Array
    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    residual: jax.Array


@flax.struct.dataclass
class LayerWeights:
    """The arrays of one layer: its slices of `Params` and of a `StackedAdapter`, and its attention kind.

    Attributes:
        layer: int32 scalar, index of the layer.
        weights: role -> (O, I).
        biases: role -> (O,).
        norms: name -> gain.
        norm_biases: name -> bias.
        activation: trained parameters of the activation.
        factors: role -> factors of an adapter; empty without one.
        window: int32 scalar, number of visible positions.
        rope: int32 scalar, index of the rotary setting.
    """

    layer: jax.Array
    weights: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    norms: dict[str, jax.Array]
    norm_biases: dict[str, jax.Array]
    activation: tuple[jax.Array, ...]
    factors: dict[str, StackedFactors]
    window: jax.Array
    rope: jax.Array


@flax.struct.dataclass
class Context:
    """The arrays that all layers share.

    Attributes:
        query_positions: int32 (B, T).
        key_positions: int32 (B, S), negative where there is no token; S is T without a cache.
        rotations: float32 (2, B, T, pairs), cosine and sine, for each rotary setting.
        growths: float32 (B, T), factor on the queries, for each rotary setting; None where queries do not grow.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    rotations: tuple[jax.Array, ...]
    growths: tuple[jax.Array, ...] | None = None


def layer_forward(
    settings: DecoderSettings, layer: LayerWeights, context: Context, x: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None, LayerCapture]:
    """Run a layer on the residual stream x (B, T, H).

    Returns:
        The residual stream after the layer, the cache with the layer's keys and values, and the captures.
    """
    capture = LayerCapture(layer.layer, {}, {}, x)
    normed = _norm(settings, layer, "attn", x)
    mixed, cache = _attention(settings, layer, context, normed, cache, capture)
    added = _added(settings, layer, "attn_post", mixed)
    if settings.parallel:
        x = x + added + _added(settings, layer, "mlp_post", _mlp(settings, layer, normed, capture))
    else:
        x = x + added
        normed = _norm(settings, layer, "mlp", x)
        x = x + _added(settings, layer, "mlp_post", _mlp(settings, layer, normed, capture))
    return x, cache, LayerCapture(layer.layer, capture.inputs, capture.outputs, x)


def _attention(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    normed: jax.Array,
    cache: KVCache | None,
    capture: LayerCapture,
) -> tuple[jax.Array, KVCache | None]:
    queries, keys, values = (_module(role, layer, normed, capture) for role in ("q_proj", "k_proj", "v_proj"))
    rotation = _of_layer(layer, context.rotations)
    queries = _placed(settings, layer, "q", queries, rotation)
    keys = _placed(settings, layer, "k", keys, rotation).swapaxes(1, 2)
    values = _split_heads(values, settings).swapaxes(1, 2)
    if context.growths is not None:
        growth = _of_layer(layer, context.growths)[:, :, None, None]
        queries = (queries.astype(jnp.float32) * growth).astype(queries.dtype)
    if cache is not None:
        cache, keys, values = append_layer(cache, layer.layer, keys, values)
    mask = attention_mask(context.query_positions, context.key_positions, layer.window)
    mixed = attention(queries, keys, values, mask, settings.attn_scale, settings.attn_soft_cap)
    return _module("o_proj", layer, mixed, capture), cache


def _placed(settings: DecoderSettings, layer: LayerWeights, norm: str, x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Split queries or keys into heads, normalise them and apply their positions."""
    if settings.qk_norms == "whole":
        x = _norm(settings, layer, norm, x)
    x = _split_heads(x, settings)
    if settings.qk_norms == "head":
        x = _norm(settings, layer, norm, x)
    x = apply_rope(x, rotation, interleaved=settings.interleaved)
    return _norm(settings, layer, norm, x) if settings.qk_norms == "rotated" else x


def _mlp(settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture) -> jax.Array:
    activate = ACTIVATIONS[settings.activation]
    gate = _module("gate_proj", layer, normed, capture) if "gate_proj" in layer.weights else None
    up = _module("up_proj", layer, normed, capture)
    inner = activate(up, *layer.activation) if gate is None else activate(gate, *layer.activation) * up
    return _module("down_proj", layer, inner, capture)


def _module(role: str, layer: LayerWeights, x: jax.Array, capture: LayerCapture) -> jax.Array:
    out = linear(x, layer.weights[role])
    if role in layer.biases:
        out = out + layer.biases[role].astype(jnp.float32)
    if role in layer.factors:
        out = out + update(x, layer.factors[role])
    capture.inputs[INPUT_SITES[role]] = x
    capture.outputs[role] = out.astype(x.dtype)
    return capture.outputs[role]


def _norm(settings: DecoderSettings, layer: LayerWeights, norm: str, x: jax.Array) -> jax.Array:
    if norm not in layer.norms:
        return x
    if settings.layer_norm:
        return layer_norm(x, layer.norms[norm], layer.norm_biases.get(norm), settings.eps)
    return rms_norm(x, layer.norms[norm], settings.eps)


def _added(settings: DecoderSettings, layer: LayerWeights, norm: str, out: jax.Array) -> jax.Array:
    """Return what attention or MLP add to the residual stream."""
    out = _norm(settings, layer, norm, out)
    return out if settings.residual_scale == 1.0 else out * jnp.asarray(settings.residual_scale, out.dtype)


def _split_heads(x: jax.Array, settings: DecoderSettings) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, settings.head_dim)


def _of_layer(layer: LayerWeights, settings: tuple[jax.Array, ...]) -> jax.Array:
    """Return the array of a layer's own rotary setting."""
    return settings[0] if len(settings) == 1 else jnp.stack(settings)[layer.rope]
