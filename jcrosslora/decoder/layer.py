"""The arrays of one layer, what is kept of its run, and how its linear modules and norms are applied."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jcrosslora.checkpoint.family.parts import LayerParts
from jcrosslora.decoder.adapters import RoleUpdates
from jcrosslora.decoder.ops import Row, is_packed, layer_norm, linear, rms_norm
from jcrosslora.decoder.settings import DecoderSettings, RoleFactors

# The name under which the outputs of linear modules are kept for the backward pass. To compute what lies between them
# again is faster on a CPU than to write it to memory and read it.
MODULE_OUTPUT = "module output"

# The place in a layer where the input of each role is read. All roles of a place are in the same layers.
INPUT_SITES = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "qg_proj": "attn_in",
    "kv_shared_q_proj": "kv_shared_attn_in",
    "o_proj": "attn_out_in",
    "global_q_proj": "global_attn_in",
    "global_k_proj": "global_attn_in",
    "global_v_proj": "global_attn_in",
    "global_kv_shared_q_proj": "global_kv_shared_attn_in",
    "global_o_proj": "global_attn_out_in",
    "conv_in_proj": "conv_in",
    "conv_out_proj": "conv_out_in",
    "delta_q_proj": "delta_in",
    "delta_k_proj": "delta_in",
    "delta_v_proj": "delta_in",
    "in_proj_qkvz": "delta_in",
    "in_proj_ba": "delta_in",
    "in_proj_qkv": "delta_in",
    "in_proj_z": "delta_in",
    "in_proj_b": "delta_in",
    "in_proj_a": "delta_in",
    "delta_out_proj": "delta_out_in",
    "mamba_in_proj": "mamba_in",
    "mamba_out_proj": "mamba_out_in",
    "q_a_proj": "attn_in",
    "q_b_proj": "q_latent",
    "kv_a_proj_with_mqa": "attn_in",
    "kv_b_proj": "kv_latent",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "down_in",
    "wide_gate_proj": "wide_mlp_in",
    "wide_up_proj": "wide_mlp_in",
    "wide_down_proj": "wide_down_in",
    "shared_gate_proj": "shared_in",
    "shared_up_proj": "shared_in",
    "shared_expert_gate": "shared_in",
    "shared_down_proj": "shared_down_in",
    "expert_in_proj": "expert_in",
    "expert_out_proj": "expert_out_in",
    "per_layer_input_gate": "per_layer_in",
    "per_layer_projection": "per_layer_out_in",
}


@flax.struct.dataclass
class LayerCapture:
    """The inputs and outputs of one layer; under jit, those that nothing uses are neither computed nor kept.

    Attributes:
        layer: int32 scalar, index of the layer.
        inputs: site -> (B, T, I): "attn_in" of q, k and v, "attn_out_in" of o, "mlp_in" of gate and up, "down_in" of
            down (see `INPUT_SITES` for these and the others).
        outputs: role -> (B, T, O), the module's output with bias and adapter, before any norm or rotary position.
        residual: (B, T, H), the residual stream after the layer.
    """

    layer: jax.Array
    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    residual: jax.Array


@flax.struct.dataclass
class LayerWeights:
    """The arrays of one layer: its slices of `Params` and of an `AppliedAdapter`, and its attention kind.

    Attributes:
        layer: int32 scalar, index of the layer.
        place: int32 scalar, index among the layers with the same mixer, which is that of its entries in a cache.
        weights: role -> (O, I).
        biases: role -> (O,).
        norms: name -> gain.
        norm_biases: name -> bias.
        activation: trained parameters of the activation.
        factors: role -> what an adapter changes; empty without one.
        window: int32 scalar, number of visible positions.
        rope: int32 scalar, index of the rotary setting.
        tensors: name -> tensor, see `Family.tensors` and `EXPERT_TENSORS`; those of experts are a `Row`.
        parts: static, the mixer and the MLP.
        factors_of_roles: static, on what modules read and return.
    """

    layer: jax.Array
    place: jax.Array
    weights: dict[str, jax.Array | Row]
    biases: dict[str, jax.Array]
    norms: dict[str, jax.Array]
    norm_biases: dict[str, jax.Array]
    activation: tuple[jax.Array, ...]
    factors: dict[str, RoleUpdates]
    window: jax.Array
    rope: jax.Array
    tensors: dict[str, Any]
    parts: LayerParts = flax.struct.field(pytree_node=False)
    factors_of_roles: RoleFactors = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Context:
    """The arrays that all layers share.

    Attributes:
        query_positions: int32 (B, T).
        key_positions: int32 (B, S), negative where there is no token; S is T without a cache.
        valid: bool (B, T), False at padding.
        rotations: float32 (2, B, T, pairs), cosine and sine, for each rotary setting.
        growths: float32 (B, T), factor on the queries, for each rotary setting; None where queries do not grow.
        inputs: (L, B, T, P), what each layer reads beside the stream, see `layer_inputs`; None without any.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    valid: jax.Array
    rotations: tuple[jax.Array, ...]
    growths: tuple[jax.Array, ...] | None = None
    inputs: jax.Array | None = None


def run_module(role: str, layer: LayerWeights, x: jax.Array, capture: LayerCapture) -> jax.Array:
    """Run a linear module on x (..., I), with bias and adapter, and note what it read and returned.

    The factor on what it returns is applied behind that, the one on what it reads in front.
    """
    x = _times(dict(layer.factors_of_roles.inputs).get(role), x)
    out = linear(x, layer.weights[role])
    if role in layer.biases:
        out = out + layer.biases[role].astype(jnp.float32)
    if role in layer.factors:
        # The module's own product reads a rounded x as well, see `linear`.
        out = layer.factors[role].apply(x.astype(jnp.bfloat16) if is_packed(layer.weights[role]) else x, out)
    capture.inputs[INPUT_SITES[role]] = x
    capture.outputs[role] = checkpoint_name(out.astype(x.dtype), MODULE_OUTPUT)
    return _times(dict(layer.factors_of_roles.outputs).get(role), capture.outputs[role])


def _times(factor: float | None, x: jax.Array) -> jax.Array:
    return x if factor is None else x * jnp.asarray(factor, x.dtype)


def apply_norm(settings: DecoderSettings, layer: LayerWeights, norm: str, x: jax.Array) -> jax.Array:
    """Apply a norm by its place in `Family.norms`; return x where the layer has none there."""
    if norm not in layer.norms:
        return x
    if settings.layer_norm:
        return layer_norm(x, layer.norms[norm], layer.norm_biases.get(norm), settings.eps)
    return rms_norm(x, layer.norms[norm], settings.eps)


def of_layer(settings: DecoderSettings, layer: LayerWeights, arrays: tuple[jax.Array, ...]) -> jax.Array:
    """Return the array of a layer's own rotary setting, of one array for each."""
    own = settings.ropes_of(layer.parts.mixer)
    return arrays[own[0]] if len(own) == 1 else jnp.stack(arrays)[layer.rope]
