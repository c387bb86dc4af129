"""The MLP of a layer with experts: those that the router chooses for each token, and those that all tokens share."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jcrosslora.decoder.adapters import RoleUpdates
from jcrosslora.decoder.experts.grouped import mix, run_experts, sort_by_expert, spread
from jcrosslora.decoder.experts.routing import route
from jcrosslora.decoder.layer import MODULE_OUTPUT, LayerCapture, LayerWeights, run_module
from jcrosslora.decoder.ops import ACTIVATIONS, linear
from jcrosslora.decoder.settings import DecoderSettings


def expert_mlp(
    settings: DecoderSettings,
    layer: LayerWeights,
    normed: jax.Array,
    capture: LayerCapture,
    routed: jax.Array | None = None,
) -> jax.Array:
    """Run the experts of a layer on the normed stream (B, T, H), and add those that all tokens share.

    The router reads `routed`, of the same shape, where it is given.
    """
    assert settings.experts is not None
    own, tensors = settings.experts, layer.tensors
    flat = normed.reshape(math.prod(normed.shape[:-1]), normed.shape[-1])
    read = flat if routed is None else routed.reshape(flat.shape)
    chosen, weights = route(own, read, tensors["router"], tensors.get("router_bias"), tensors.get("correction"))
    weights = weights * tensors["expert_scale"][chosen] if "expert_scale" in tensors else weights
    latent = "expert_in_proj" in layer.weights
    if latent:
        flat = run_module("expert_in_proj", layer, normed, capture).reshape(len(flat), -1)

    order = sort_by_expert(chosen, own.count)

    def product(name: str, rows: jax.Array) -> jax.Array:
        held = {key: tensors[key] for key in (name, f"{name}_bias") if key in tensors}
        factors = {key: layer.factors[key] for key in (name,) if key in layer.factors}
        return checkpoint_name(run_experts(partial(_matrix, name), rows, order, held, factors), MODULE_OUTPUT)

    rows = spread(flat, order, weights if own.scaled_inputs else None)
    inner = _activated(settings, product("gate_up", rows)).astype(rows.dtype)
    shares = jnp.ones_like(weights) if own.scaled_inputs else weights
    mixed = mix(product("down", inner), shares, order)
    mixed = mixed.astype(normed.dtype).reshape(*normed.shape[:-1], -1)
    mixed = run_module("expert_out_proj", layer, mixed, capture) if latent else mixed
    if "shared_down_proj" not in layer.weights:
        return mixed
    both = mixed + _shared(settings, layer, normed, capture)
    return both * jnp.asarray(0.5, both.dtype) if own.averaged else both


def _matrix(name: str, rows: jax.Array, held: dict[str, jax.Array], factors: dict[str, RoleUpdates]) -> jax.Array:
    """Multiply rows (N, I) with a matrix of one expert, with its bias and adapter: float32 (N, O)."""
    out = linear(rows, held[name])
    if f"{name}_bias" in held:
        out = out + held[f"{name}_bias"]
    return factors[name].apply(rows, out) if name in factors else out


def _activated(settings: DecoderSettings, inner: jax.Array) -> jax.Array:
    """Apply the activation to gate and up, (N, 2 I) side by side, or without a gate to (N, I)."""
    assert settings.experts is not None
    if not settings.experts.gated:
        return ACTIVATIONS[settings.activation](inner)
    gate, up = jnp.split(inner, 2, axis=-1)
    if settings.experts.clamp is None:
        return ACTIVATIONS[settings.activation](gate) * up
    alpha, limit = settings.experts.clamp
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def _shared(settings: DecoderSettings, layer: LayerWeights, normed: jax.Array, capture: LayerCapture) -> jax.Array:
    activate, up = ACTIVATIONS[settings.activation], run_module("shared_up_proj", layer, normed, capture)
    if "shared_gate_proj" in layer.weights:
        inner = activate(run_module("shared_gate_proj", layer, normed, capture)) * up
    else:
        inner = activate(up)
    out = run_module("shared_down_proj", layer, inner, capture)
    if "shared_expert_gate" not in layer.weights:
        return out
    return out * jax.nn.sigmoid(run_module("shared_expert_gate", layer, normed, capture))
