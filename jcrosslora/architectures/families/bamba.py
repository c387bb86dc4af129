"""Bamba: Mamba 2 in most layers, attention with half of each head rotated in those that are listed."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.architectures.architecture import Architecture, attention, usual_layers
from jcrosslora.architectures.blocks import Mamba2
from jcrosslora.architectures.families.mamba2 import mamba
from jcrosslora.architectures.family import Family, Positions
from jcrosslora.architectures.layer import Layer
from jcrosslora.architectures.names import ATTENTION, MAMBA, MLP, words
from jcrosslora.architectures.sizes import Number, layer_count, size
from jcrosslora.errors import CheckpointError


def _mamba(config: Mapping[str, Any]) -> Mamba2:
    return mamba(config, size(config, "mamba_expand", 2) * size(config, "hidden_size"), "behind the gate")


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """State the layers of attention, and check the sizes of the others."""
    stated, layers = config.get("attn_layer_indices") or [], layer_count(config)
    if not isinstance(stated, list | tuple) or not all(type(layer) is int and 0 <= layer < layers for layer in stated):
        msg = f"config key 'attn_layer_indices' is {str(stated)[:60]}, wanted a list of some of {layers} layers"
        raise CheckpointError(msg)
    _mamba(config)
    return {**config, "attn_layer_indices": list(stated)}


def _layers(model: Architecture) -> list[Layer]:
    with_attention, mamba, full = set(model.config["attn_layer_indices"]), _mamba(model.config), attention(model)
    return usual_layers(model, [full if layer in with_attention else mamba for layer in range(model.dims.layers)])


BAMBA = Family(
    name="bamba",
    architectures=("BambaForCausalLM",),
    layers=_layers,
    blocks=(Mamba2,),
    resolve=_resolve,
    fused={f"feed_forward.{role}": (role,) for role in MLP},
    norms={"attn": "input_layernorm", "mlp": "pre_ff_layernorm"},
    final_norm="model.final_layernorm",
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP, "mamba_proj_bias": MAMBA},
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(share=0.5),
    keys=words(
        "attention_bias attn_layer_indices mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state "
        "mamba_expand mamba_n_groups mamba_n_heads mamba_proj_bias mlp_bias num_logits_to_keep partial_rotary_factor "
        "time_step_limit z_loss_coefficient layer_types"
    ),
)
