"""One decoder layer: what mixes its positions, its MLP, and how both are added to the residual stream."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jcrosslora.decoder.attention import KVCache
from jcrosslora.decoder.experts.mlp import expert_mlp
from jcrosslora.decoder.layer import Context, LayerCapture, LayerWeights, apply_norm, run_module
from jcrosslora.decoder.mixers.latent_attention import latent_attention
from jcrosslora.decoder.mixers.mixer import beside_attention, run_mixer
from jcrosslora.decoder.mixers.self_attention import self_attention
from jcrosslora.decoder.ops import ACTIVATIONS
from jcrosslora.decoder.settings import DecoderSettings

# Of the normed stream (B, T, H) and a cache: what is added to the stream, before any norm, and the cache with what the
# layer keeps of these tokens.
Mixer = Callable[
    [DecoderSettings, LayerWeights, Context, jax.Array, KVCache | None, LayerCapture], tuple[jax.Array, KVCache | None]
]
# Of the normed stream (B, T, H): what is added to the stream, before any norm.
MLP = Callable[[DecoderSettings, LayerWeights, jax.Array, LayerCapture], jax.Array]


def layer_forward(
    settings: DecoderSettings, layer: LayerWeights, context: Context, x: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None, LayerCapture]:
    """Run a layer on the residual stream x (B, T, H).

    Returns:
        The residual stream after the layer, the cache with what the layer keeps of these tokens, and the captures.
    """
    mixer, mlp = MIXERS[layer.parts.mixer], MLPS[layer.parts.mlp]
    capture = LayerCapture(layer.layer, {}, {}, x)
    normed = apply_norm(settings, layer, "attn", x)
    mixed, cache = mixer(settings, layer, context, normed, cache, capture)
    added = _added(settings, layer, "attn_post", mixed)
    if settings.parallel:
        x = x + added + _added(settings, layer, "mlp_post", mlp(settings, layer, normed, capture))
    else:
        x = x + added
        normed = apply_norm(settings, layer, "mlp", x)
        x = x + _added(settings, layer, "mlp_post", mlp(settings, layer, normed, capture))
    return x, cache, LayerCapture(layer.layer, capture.inputs, capture.outputs, x)


def _dense(settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture) -> jax.Array:
    activate = ACTIVATIONS[settings.activation]
    gate = run_module("gate_proj", layer, normed, capture) if "gate_proj" in layer.weights else None
    up = run_module("up_proj", layer, normed, capture)
    inner = activate(up, *layer.activation) if gate is None else activate(gate, *layer.activation) * up
    return run_module("down_proj", layer, inner, capture)


def _dense_and_experts(
    settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture
) -> jax.Array:
    return expert_mlp(settings, layer, normed, capture) + _dense(settings, layer, normed, capture)


def _added(settings: DecoderSettings, layer: LayerWeights, norm: str, out: jax.Array) -> jax.Array:
    """Return what mixer or MLP add to the residual stream."""
    out = apply_norm(settings, layer, norm, out)
    return out if settings.residual_scale == 1.0 else out * jnp.asarray(settings.residual_scale, out.dtype)


# By the names of the parts of a layer, see `jcrosslora.checkpoint.family.parts`.
MIXERS: Mapping[str, Mixer] = {
    "attention": self_attention,
    "latent_attention": latent_attention,
    "direct_latent_attention": latent_attention,
    **dict.fromkeys(("convolution", "delta", "mamba"), run_mixer),
    "attention and mamba": beside_attention,
}
MLPS: Mapping[str, MLP] = {"dense": _dense, "experts": expert_mlp, "dense and experts": _dense_and_experts}
