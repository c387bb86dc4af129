"""Qwen3.5: the gated delta rule in three of four layers, gated attention in the others."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.mixers import Mixer
from jcrosslora.checkpoint.family.names import DELTA, GATED_ATTENTION, MLP
from jcrosslora.checkpoint.family.parts import LayerParts
from jcrosslora.checkpoint.family.record import PRE_NORMS, QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Positions
from jcrosslora.checkpoint.family.sizes import layer_count, layer_kinds, size

_LINEAR, _FULL = "linear_attention", "full_attention"


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """State the kinds of the layers, and leave out the axes of positions, which are equal in a text."""
    period, layers = size(config, "full_attention_interval", 4), layer_count(config)
    kinds = layer_kinds(config, {_LINEAR: _LINEAR, _FULL: _FULL})
    found = {**config, "layer_types": kinds or [_LINEAR if (i + 1) % period else _FULL for i in range(layers)]}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(key), Mapping):
            found[key] = {name: one for name, one in found[key].items() if not name.startswith("mrope_")}
    return found


def _parts(config: Mapping[str, Any], layers: int) -> list[LayerParts]:
    del layers  # as many as kinds, see `_resolve`
    return [LayerParts(mixer="delta" if kind == _LINEAR else "attention") for kind in config["layer_types"]]


def _mixer(config: Mapping[str, Any]) -> Mixer:
    heads, groups = size(config, "linear_num_value_heads", 32), size(config, "linear_num_key_heads", 16)
    if heads % groups:
        msg = f"linear_num_value_heads {heads} is not a multiple of linear_num_key_heads {groups}"
        raise ValueError(msg)
    return Mixer(
        "delta",
        size(config, "hidden_size"),
        size(config, "linear_conv_kernel_dim", 4),
        heads=heads,
        groups=groups,
        key_size=size(config, "linear_key_head_dim", 128),
        value_size=size(config, "linear_value_head_dim", 128),
        norm="before the gate",
    )


QWEN3_5 = Family(
    name="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    roles=(*GATED_ATTENTION, *DELTA, *MLP),
    resolve=_resolve,
    parts=_parts,
    mixer=_mixer,
    norms=PRE_NORMS | QK_NORMS,
    gain_offset=1.0,
    bias_keys={"attention_bias": GATED_ATTENTION},
    positions=Positions(share=0.25),
    keys=words(
        "attention_bias layer_types full_attention_interval partial_rotary_factor linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads mamba_ssm_dtype "
        "mtp_num_hidden_layers mtp_use_dedicated_embeddings"
    ),
    fixed={"attn_output_gate": (True,), "mlp_only_layers": ([],)},
    defaults={"head_dim": 256},
)
