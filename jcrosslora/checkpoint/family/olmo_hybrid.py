"""OLMo Hybrid: the gated delta rule in three of four layers, attention as in OLMo 3 in the others.

Layers of the delta rule have norms in front of mixer and MLP, those of attention behind both. Some published models
have no positions.
"""

from collections.abc import Mapping
from typing import Any

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.mixers import Mixer
from jcrosslora.checkpoint.family.names import ATTENTION, MLP, SEPARATE_DELTA
from jcrosslora.checkpoint.family.parts import LayerParts
from jcrosslora.checkpoint.family.record import POST_NORMS, PRE_NORMS, QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Positions
from jcrosslora.checkpoint.family.sizes import check_multiple, layer_count, layer_kinds, size
from jcrosslora.errors import CheckpointError

_LINEAR, _FULL = "linear_attention", "full_attention"
_PERIOD = 4
_PARTS = {
    _LINEAR: LayerParts("norm, then delta", "norm, then dense"),
    _FULL: LayerParts("attention, then norm", "dense, then norm"),
}


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """State the kinds of the layers, and in `rope_parameters` a `rope_theta` of null, where there are no positions."""
    kinds = layer_kinds(config, {_LINEAR: _LINEAR, _FULL: _FULL})
    if kinds is None:
        kinds = [_LINEAR if (layer + 1) % _PERIOD else _FULL for layer in range(layer_count(config))]
        kinds = kinds if _FULL in kinds else [*kinds[:-1], _FULL]
    found = {**config, "layer_types": kinds}
    ropes = config.get("rope_scaling") or config.get("rope_parameters")
    ropes = ropes if isinstance(ropes, Mapping) else {}
    stated = [settings["rope_theta"] for settings in (ropes, config) if "rope_theta" in settings]
    if not stated or stated[0] is not None:
        return found
    kept = {key: value for key, value in found.items() if key not in ("rope_theta", "rope_scaling")}
    return {**kept, "rope_parameters": {"rope_theta": None}}


def _parts(config: Mapping[str, Any], layers: int) -> list[LayerParts]:
    del layers  # as many as kinds
    return [_PARTS[kind] for kind in config["layer_types"]]  # of `_resolve`


def _mixer(config: Mapping[str, Any]) -> Mixer:
    hidden, usual = size(config, "hidden_size"), size(config, "num_attention_heads")
    heads, groups = size(config, "linear_num_value_heads", usual), size(config, "linear_num_key_heads", usual)
    check_multiple("linear_num_value_heads", heads, "linear_num_key_heads", groups)
    key_size = size(config, "linear_key_head_dim", int(0.75 * hidden / groups))
    negative = config.get("linear_allow_neg_eigval", True)
    if not isinstance(negative, bool):
        msg = f"config key 'linear_allow_neg_eigval' is {repr(negative)[:60]}, wanted true or false"
        raise CheckpointError(msg)
    return Mixer(
        "delta",
        hidden,
        size(config, "linear_conv_kernel_dim", 4),
        heads=heads,
        groups=groups,
        key_size=key_size,
        value_size=size(config, "linear_value_head_dim", 2 * key_size),
        norm="before the gate",
        separate=True,
        beta_limit=2.0 if negative else 1.0,
        eps=1e-5,
    )


OLMO_HYBRID = Family(
    name="olmo_hybrid",
    architectures=("OlmoHybridForCausalLM",),
    roles=(*ATTENTION, *SEPARATE_DELTA, *MLP),
    fused={
        "linear_attn.g_proj": ("in_proj_z",),
        "linear_attn.b_proj": ("in_proj_b",),
        "linear_attn.a_proj": ("in_proj_a",),
        "linear_attn.o_proj": ("delta_out_proj",),
    },
    # Files call the norm in front of the MLP and the one behind attention the same, and hold the convolution in parts.
    file_modules={
        "attention_layer_norm": "input_layernorm",
        "feedforward_layer_norm": "post_attention_layernorm",
        **dict.fromkeys((f"linear_attn.{part}_conv1d" for part in "qkv"), "linear_attn.conv1d"),
    },
    resolve=_resolve,
    parts=_parts,
    mixer=_mixer,
    norms=PRE_NORMS | POST_NORMS | QK_NORMS,
    qk_norms="whole",
    bias_keys={"attention_bias": ATTENTION},
    positions=Positions(unrotated="no theta"),
    # Beside what is read, settings of the initialisation.
    keys=words(
        "attention_bias layer_types linear_a_log_max linear_a_log_min linear_allow_neg_eigval linear_conv_kernel_dim "
        "linear_dt_init_floor linear_dt_max linear_dt_min linear_key_head_dim linear_num_key_heads "
        "linear_num_value_heads linear_value_head_dim"
    ),
)
