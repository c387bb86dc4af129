"""One decoder layer, with captures of its inputs and outputs."""

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.decoder.adapters import StackedFactors, update
from jcrosslora.decoder.attention import KVCache, append_layer, apply_rope, attention, attention_mask
from jcrosslora.decoder.ops import ACTIVATIONS, linear, rms_norm
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
        factors: role -> factors of an adapter; empty without one.
        window: int32 scalar, number of visible positions.
        rope: int32 scalar, index of the rotary setting.
    """

    layer: jax.Array
    weights: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    norms: dict[str, jax.Array]
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
    """

    query_positions: jax.Array
    key_positions: jax.Array
    rotations: tuple[jax.Array, ...]


def layer_forward(
    settings: DecoderSettings, layer: LayerWeights, context: Context, x: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None, LayerCapture]:
    """Run a layer on the residual stream x (B, T, H).

    Returns:
        The residual stream after the layer, the cache with the layer's keys and values, and the captures.
    """
    capture = LayerCapture(layer.layer, {}, {}, x)
    mixed, cache = _attention(settings, layer, context, x, cache, capture)
    x = x + _post_norm(settings, layer, "attn_post", mixed)
    x = x + _post_norm(settings, layer, "mlp_post", _mlp(settings, layer, x, capture))
    return x, cache, LayerCapture(layer.layer, capture.inputs, capture.outputs, x)


def _attention(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    x: jax.Array,
    cache: KVCache | None,
    capture: LayerCapture,
) -> tuple[jax.Array, KVCache | None]:
    normed = rms_norm(x, layer.norms["attn"], settings.eps)
    queries = _split_heads(_module("q_proj", layer, normed, capture), settings)
    keys = _split_heads(_module("k_proj", layer, normed, capture), settings)
    values = _split_heads(_module("v_proj", layer, normed, capture), settings).swapaxes(1, 2)
    if settings.qk_norms:
        queries = rms_norm(queries, layer.norms["q"], settings.eps)
        keys = rms_norm(keys, layer.norms["k"], settings.eps)
    rotation = _rotation(layer, context)
    queries, keys = apply_rope(queries, rotation), apply_rope(keys, rotation).swapaxes(1, 2)
    if cache is not None:
        cache, keys, values = append_layer(cache, layer.layer, keys, values)
    mask = attention_mask(context.query_positions, context.key_positions, layer.window)
    mixed = attention(queries, keys, values, mask, settings.attn_scale, settings.attn_soft_cap)
    return _module("o_proj", layer, mixed, capture), cache


def _mlp(settings: DecoderSettings, layer: LayerWeights, x: jax.Array, capture: LayerCapture) -> jax.Array:
    normed = rms_norm(x, layer.norms["mlp"], settings.eps)
    gate, up = _module("gate_proj", layer, normed, capture), _module("up_proj", layer, normed, capture)
    return _module("down_proj", layer, ACTIVATIONS[settings.activation](gate) * up, capture)


def _module(role: str, layer: LayerWeights, x: jax.Array, capture: LayerCapture) -> jax.Array:
    out = linear(x, layer.weights[role])
    if role in layer.biases:
        out = out + layer.biases[role].astype(jnp.float32)
    if role in layer.factors:
        out = out + update(x, layer.factors[role])
    capture.inputs[INPUT_SITES[role]] = x
    capture.outputs[role] = out.astype(x.dtype)
    return capture.outputs[role]


def _post_norm(settings: DecoderSettings, layer: LayerWeights, norm: str, out: jax.Array) -> jax.Array:
    return rms_norm(out, layer.norms[norm], settings.eps) if settings.post_norms else out


def _split_heads(x: jax.Array, settings: DecoderSettings) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, settings.head_dim)


def _rotation(layer: LayerWeights, context: Context) -> jax.Array:
    if len(context.rotations) == 1:
        return context.rotations[0]
    return jnp.stack(context.rotations)[layer.rope]
