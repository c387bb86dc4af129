"""One decoder layer, and what it lets be seen of itself."""

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.decoder.adapters import StackedFactors, update
from jcrosslora.decoder.attention import attend, visible
from jcrosslora.decoder.cache import Cache, store
from jcrosslora.decoder.ops import ACTIVATIONS, project, rms_norm
from jcrosslora.decoder.rope import rotate
from jcrosslora.decoder.settings import DecoderSettings

# Where the input of each role is read: the distinct places of a layer.
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
    """What one layer saw and made; what a consumer does not use is never computed or kept.

    Attributes:
        layer: int32 scalar, its index.
        inputs: site -> (B, T, I): "attn_in" of q, k and v, "attn_out_in" of o, "mlp_in" of gate and up, "down_in" of
            down (see `INPUT_SITES`).
        outputs: role -> (B, T, O): what the module returns, bias and adapter included, before any norm or rotation.
        residual: (B, T, H), the residual stream behind the layer.
    """

    layer: jax.Array
    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    residual: jax.Array


@flax.struct.dataclass
class LayerWeights:
    """The slices of one layer: of `Params`, of a `StackedAdapter`, and its kind.

    Attributes:
        layer: int32 scalar, its index.
        weights: role -> (O, I).
        biases: role -> (O,).
        norms: name -> gain.
        factors: role -> the factors of an adapter, empty without one.
        window: int32 scalar, positions seen.
        rope: int32 scalar, which rotation.
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
    """What all layers share.

    Attributes:
        query_positions: int32 (B, T).
        key_positions: int32 (B, S), negative where there is no token; S is T without a cache.
        rotations: float32 (2, B, T, pairs) for each rotary setting.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    rotations: tuple[jax.Array, ...]


def layer_forward(
    settings: DecoderSettings, layer: LayerWeights, context: Context, x: jax.Array, cache: Cache | None
) -> tuple[jax.Array, Cache | None, LayerCapture]:
    """The residual stream (B, T, H) behind a layer, the cache with its keys and values, and what there is to see."""
    seen = LayerCapture(layer.layer, {}, {}, x)
    mixed, cache = _attention(settings, layer, context, x, cache, seen)
    x = x + _behind(settings, layer, "attn_post", mixed)
    x = x + _behind(settings, layer, "mlp_post", _mlp(settings, layer, x, seen))
    return x, cache, LayerCapture(layer.layer, seen.inputs, seen.outputs, x)


def _attention(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    x: jax.Array,
    cache: Cache | None,
    seen: LayerCapture,
) -> tuple[jax.Array, Cache | None]:
    normed = rms_norm(x, layer.norms["attn"], settings.eps)
    queries = _heads(_module("q_proj", layer, normed, seen), settings)
    keys = _heads(_module("k_proj", layer, normed, seen), settings)
    values = _heads(_module("v_proj", layer, normed, seen), settings).swapaxes(1, 2)
    if settings.head_norms:
        queries = rms_norm(queries, layer.norms["q"], settings.eps)
        keys = rms_norm(keys, layer.norms["k"], settings.eps)
    rotation = _rotation(layer, context)
    queries, keys = rotate(queries, rotation), rotate(keys, rotation).swapaxes(1, 2)
    if cache is not None:
        cache, keys, values = store(cache, layer.layer, keys, values)
    allowed = visible(context.query_positions, context.key_positions, layer.window)
    mixed = attend(queries, keys, values, allowed, settings.query_scale, settings.score_cap)
    return _module("o_proj", layer, mixed, seen), cache


def _mlp(settings: DecoderSettings, layer: LayerWeights, x: jax.Array, seen: LayerCapture) -> jax.Array:
    normed = rms_norm(x, layer.norms["mlp"], settings.eps)
    gate, up = _module("gate_proj", layer, normed, seen), _module("up_proj", layer, normed, seen)
    return _module("down_proj", layer, ACTIVATIONS[settings.activation](gate) * up, seen)


def _module(role: str, layer: LayerWeights, x: jax.Array, seen: LayerCapture) -> jax.Array:
    out = project(x, layer.weights[role])
    if role in layer.biases:
        out = out + layer.biases[role].astype(jnp.float32)
    if role in layer.factors:
        out = out + update(x, layer.factors[role])
    seen.inputs[INPUT_SITES[role]] = x
    seen.outputs[role] = out.astype(x.dtype)
    return seen.outputs[role]


def _behind(settings: DecoderSettings, layer: LayerWeights, norm: str, out: jax.Array) -> jax.Array:
    return rms_norm(out, layer.norms[norm], settings.eps) if settings.post_norms else out


def _heads(x: jax.Array, settings: DecoderSettings) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, settings.head_dim)


def _rotation(layer: LayerWeights, context: Context) -> jax.Array:
    if len(context.rotations) == 1:
        return context.rotations[0]
    return jnp.stack(context.rotations)[layer.rope]
