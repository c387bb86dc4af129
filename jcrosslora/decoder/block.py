"""One decoder layer: what mixes its positions, its MLP, what is behind it, and how all are added to the stream."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.checkpoint.family.parts import NOTHING
from jcrosslora.decoder.attention import KVCache
from jcrosslora.decoder.experts.mlp import expert_mlp
from jcrosslora.decoder.layer import Context, LayerCapture, LayerWeights, apply_norm, run_module
from jcrosslora.decoder.mixers.latent_attention import latent_attention
from jcrosslora.decoder.mixers.mixer import beside_attention, run_mixer
from jcrosslora.decoder.mixers.self_attention import kv_shared_attention, self_attention
from jcrosslora.decoder.ops import ACTIVATIONS, rms_norm
from jcrosslora.decoder.settings import DecoderSettings

# Of the normed stream (B, T, H) and a cache: what is added to the stream, before any norm, and the cache with what the
# layer keeps of these tokens.
Mixer = Callable[
    [DecoderSettings, LayerWeights, Context, jax.Array, KVCache | None, LayerCapture], tuple[jax.Array, KVCache | None]
]
# Of the normed stream (B, T, H), and of the stream: what is added to the stream, before the last norm.
MLP = Callable[[DecoderSettings, LayerWeights, jax.Array, LayerCapture, jax.Array], jax.Array]


def layer_forward(
    settings: DecoderSettings, layer: LayerWeights, context: Context, x: jax.Array, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None, LayerCapture]:
    """Run a layer on the residual stream x (B, T, H).

    Returns:
        The residual stream after the layer, the cache with what the layer keeps of these tokens, and the captures.
    """
    capture = LayerCapture(layer.layer, {}, {}, x)
    normed = apply_norm(settings, layer, "attn", x)
    if layer.parts.mixer != NOTHING:
        mixed, cache = MIXERS[layer.parts.mixer](settings, layer, context, normed, cache, capture)
        x = x + _added(settings, layer, "attn_post", mixed)
    if layer.parts.mlp != NOTHING:
        normed = normed if settings.parallel else apply_norm(settings, layer, "mlp", x)
        mlp = MLPS[layer.parts.mlp]
        x = x + _added(settings, layer, "mlp_post", mlp(settings, layer, normed, capture, x))
    if context.inputs is not None:
        x = x + _of_input(settings, layer, context.inputs, x, capture)
    if "layer_scale" in layer.tensors:
        x = x * layer.tensors["layer_scale"].astype(x.dtype)
    return x, cache, LayerCapture(layer.layer, capture.inputs, capture.outputs, x)


def _dense(
    settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture, x: jax.Array
) -> jax.Array:
    del x
    activate, wide = ACTIVATIONS[settings.activation], "wide_" if layer.parts.mlp.startswith("wide") else ""
    gate = run_module(f"{wide}gate_proj", layer, normed, capture) if f"{wide}gate_proj" in layer.weights else None
    up = run_module(f"{wide}up_proj", layer, normed, capture)
    inner = activate(up, *layer.activation) if gate is None else activate(gate, *layer.activation) * up
    return run_module(f"{wide}down_proj", layer, inner, capture)


def _experts(
    settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture, x: jax.Array
) -> jax.Array:
    del x
    return expert_mlp(settings, layer, normed, capture)


def _dense_and_experts(
    settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture, x: jax.Array
) -> jax.Array:
    return expert_mlp(settings, layer, normed, capture) + _dense(settings, layer, normed, capture, x)


def _beside_experts(
    settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture, x: jax.Array
) -> jax.Array:
    """Add MLP and experts behind norms of their own; the experts and their router read the stream through others."""
    alone = apply_norm(settings, layer, "mlp_alone", _dense(settings, layer, normed, capture, x))
    routed = rms_norm(x, layer.tensors["router_scale"] * settings.hidden**-0.5, settings.eps)
    mixed = expert_mlp(settings, layer, apply_norm(settings, layer, "experts_in", x), capture, routed)
    return alone + apply_norm(settings, layer, "experts_out", mixed)


def _of_input(
    settings: DecoderSettings, layer: LayerWeights, inputs: jax.Array, x: jax.Array, capture: LayerCapture
) -> jax.Array:
    """Return what a layer adds to the stream by its own input, of those (L, B, T, P) of all layers."""
    gate = ACTIVATIONS[settings.activation](run_module("per_layer_input_gate", layer, x, capture))
    inner = gate * lax.dynamic_index_in_dim(inputs, layer.layer, keepdims=False)
    return apply_norm(settings, layer, "per_layer_out", run_module("per_layer_projection", layer, inner, capture))


def _added(settings: DecoderSettings, layer: LayerWeights, norm: str, out: jax.Array) -> jax.Array:
    """Return what mixer or MLP add to the residual stream."""
    out = apply_norm(settings, layer, norm, out)
    return out if settings.residual_scale == 1.0 else out * jnp.asarray(settings.residual_scale, out.dtype)


# By the names of the parts of a layer, see `jcrosslora.checkpoint.family.parts`.
MIXERS: Mapping[str, Mixer] = {
    **dict.fromkeys(("attention", "attention, then norm"), self_attention),
    **dict.fromkeys(("global_attention", "global_key_attention"), self_attention),
    **dict.fromkeys(("kv_shared_attention", "global_kv_shared_attention"), kv_shared_attention),
    "latent_attention": latent_attention,
    "direct_latent_attention": latent_attention,
    **dict.fromkeys(("convolution", "delta", "norm, then delta", "mamba"), run_mixer),
    "attention and mamba": beside_attention,
}
MLPS: Mapping[str, MLP] = {
    **dict.fromkeys(("dense", "dense, then norm", "norm, then dense", "wide"), _dense),
    **dict.fromkeys(("experts", "latent experts", "routed experts"), _experts),
    "dense and experts": _dense_and_experts,
    **dict.fromkeys(("dense beside experts", "wide beside experts"), _beside_experts),
}
