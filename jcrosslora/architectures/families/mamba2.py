"""Families with layers of Mamba 2: Granite 4, Bamba, and Falcon-H1, which has attention in every layer too."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from jcrosslora.architectures.architecture import Architecture, Layer, attention, experts, mlp, usual_layers
from jcrosslora.architectures.blocks import ATTENTION, MAMBA, MLP, QKV, Mamba2, MlpAndExperts, Parallel
from jcrosslora.architectures.config import (
    FULL,
    LINEAR,
    Number,
    at_attention,
    layer_count,
    layer_kinds,
    numbers,
    refuse,
    size,
    words,
)
from jcrosslora.architectures.families.llama import GRANITE_EXPERTS, GRANITE_FACTORS, granite
from jcrosslora.architectures.family import Family, Gguf, Positions
from jcrosslora.errors import CheckpointError

# Keys of all these families; the classes do not read the chunk size.
_KEYS = words(
    "mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state mamba_expand mamba_n_groups "
    "mamba_n_heads time_step_limit layer_types"
)


def _mamba(config: Mapping[str, Any], inner: int, norm: Literal["before the gate", "behind the gate"] | None) -> Mamba2:
    """Read the state-space model from the keys `mamba_*`; `inner` is the number of value features of all heads."""
    heads, groups = size(config, "mamba_n_heads", 128), size(config, "mamba_n_groups", 1)
    stated = config.get("mamba_d_head", "auto")
    each = inner // heads if stated in ("auto", None) else size(config, "mamba_d_head")
    if heads * each != inner or heads % groups:
        msg = f"mamba_n_heads {heads} times mamba_d_head {each} is not {inner}, the width of the state-space layers, "
        msg += f"or mamba_n_groups {groups} does not divide it"
        raise CheckpointError(msg)
    return Mamba2(
        size(config, "hidden_size"),
        size(config, "mamba_d_conv", 4),
        heads=heads,
        groups=groups,
        key_size=size(config, "mamba_d_state", 256),
        value_size=each,
        conv_bias=bool(config.get("mamba_conv_bias", True)),
        norm=norm,
        step_limits=step_limits(config),
    )


def step_limits(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the smallest and the largest time step; without the key `time_step_limit` there is no limit."""
    low, high = numbers(config, "time_step_limit", 2) or (0.0, float("inf"))
    return low, high


def gguf_tensors(holder: str) -> dict[str, str]:
    """Map the GGUF names of Mamba 2's tensors to their names in a layer; `holder` is the module's name."""
    names = {"ssm_a": "A_log", "ssm_d": "D", "ssm_dt.bias": "dt_bias", "ssm_norm.weight": "norm.weight"}
    names |= {f"ssm_conv1d.{kind}": f"conv1d.{kind}" for kind in ("weight", "bias")}
    return {stored: f"{holder}.{name}" for stored, name in names.items()}


def _resolve_granite(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the kinds of layers, the width of the MLP for all tokens, and the width of any experts."""
    count = config.get("num_local_experts", 8)
    if type(count) is not int or count < 0:
        msg = f"config key 'num_local_experts' is {str(count)[:60]!r}, expected the number of experts, 0 for none"
        raise CheckpointError(msg)
    if config.get("position_embedding_type") not in (None, "rope", "nope"):
        msg = f"position_embedding_type {config['position_embedding_type']!r} is not supported; supported: rope, nope"
        raise CheckpointError(msg)
    kinds = layer_kinds(config, {"mamba": LINEAR, "attention": FULL, LINEAR: LINEAR, FULL: FULL})
    stated = {
        "layer_types": kinds or [LINEAR] * layer_count(config),
        "intermediate_size": size(config, "shared_intermediate_size", 1024),
        "num_local_experts": count,
    }
    if count:
        width = size(config, "intermediate_size", 11008)
        stated["moe_intermediate_size"] = size(config, "moe_intermediate_size", width)
    found = {**config, **stated}
    _expanded_mamba(found)  # whose sizes are checked
    return found


def _granite_rotated(config: Mapping[str, Any], kinds: Sequence[str]) -> list[bool]:
    return [config.get("position_embedding_type") == "rope"] * len(kinds)


def _granite_layers(model: Architecture) -> list[Layer]:
    mixers = {LINEAR: _expanded_mamba(model.config), FULL: attention(model)}
    inner = mlp(model)
    if model.config["num_local_experts"]:
        inner = MlpAndExperts(inner, experts(model))
    return [Layer(mixers[kind], inner) for kind in model.config["layer_types"]]  # of `_resolve_granite`


def _expanded_mamba(config: Mapping[str, Any]) -> Mamba2:
    return _mamba(config, size(config, "mamba_expand", 2) * size(config, "hidden_size"), "behind the gate")


def _granite_from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the settings that GGUF files state differently from configurations."""
    if "attention.scale" not in stated:
        msg = "attention.scale is missing, which all of Granite have: other models of the architecture, such as Bamba, "
        raise CheckpointError(msg + "are not supported")
    inner, heads = size(stated, "ssm.inner_size"), size(stated, "ssm.time_step_rank")
    width = "expert_shared_feed_forward_length"
    return {
        "layer_types": at_attention(stated, FULL, LINEAR),
        "shared_intermediate_size": size(stated, width if stated.get(width) else "feed_forward_length"),
        "mamba_expand": max(inner // size(stated, "embedding_length"), 1),
        "mamba_d_head": max(inner // heads, 1),
        "mamba_conv_bias": "mamba.conv1d.bias" in held,
        "position_embedding_type": "rope" if stated.get("rope.scaling.finetuned", True) else "nope",
    }


_SHARED_MLP = {
    **dict.fromkeys(("ffn_gate", "ffn_gate_shexp", "ffn_up", "ffn_up_shexp"), "shared_mlp.input_linear"),
    **dict.fromkeys(("ffn_down", "ffn_down_shexp"), "shared_mlp.output_linear"),
}

GRANITE_HYBRID = granite(
    name="granitemoehybrid",
    architectures=("GraniteMoeHybridForCausalLM",),
    gguf=Gguf(
        "granitehybrid",
        permuted=True,
        tensors={f"{stem}.weight": f"{path}.weight" for stem, path in _SHARED_MLP.items()} | gguf_tensors("mamba"),
        counts={
            "mamba_d_conv": "ssm.conv_kernel",
            "mamba_d_state": "ssm.state_size",
            "mamba_n_groups": "ssm.group_count",
            "mamba_n_heads": "ssm.time_step_rank",
        },
        numbers=GRANITE_FACTORS,
        settings=_granite_from_gguf,
    ),
    resolve=_resolve_granite,
    layers=_granite_layers,
    blocks=(Mamba2,),
    experts=GRANITE_EXPERTS,
    fused={"shared_mlp.input_linear": ("gate_proj", "up_proj"), "shared_mlp.output_linear": ("down_proj",)},
    bias_keys={"attention_bias": ATTENTION, "mamba_proj_bias": MAMBA},
    positions=Positions(rotated=_granite_rotated),
    keys=_KEYS | words("shared_intermediate_size position_embedding_type init_method"),
    fixed={"normalization_function": ("rmsnorm",)},
    defaults={"num_experts_per_tok": 2},
)


def _resolve_bamba(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the list of attention layers, and check the sizes of the others."""
    stated, layers = config.get("attn_layer_indices") or [], layer_count(config)
    if not isinstance(stated, list | tuple) or not all(type(layer) is int and 0 <= layer < layers for layer in stated):
        refuse("attn_layer_indices", stated, f"a list of some of {layers} layers")
    _expanded_mamba(config)  # whose sizes are checked
    return {**config, "attn_layer_indices": list(stated)}


def _bamba_layers(model: Architecture) -> list[Layer]:
    mamba, full, listed = _expanded_mamba(model.config), attention(model), set(model.config["attn_layer_indices"])
    return usual_layers(model, [full if layer in listed else mamba for layer in range(model.dims.layers)])


BAMBA = Family(
    name="bamba",
    architectures=("BambaForCausalLM",),
    layers=_bamba_layers,
    blocks=(Mamba2,),
    resolve=_resolve_bamba,
    fused={f"feed_forward.{role}": (role,) for role in MLP},
    norms={"attn": "input_layernorm", "mlp": "pre_ff_layernorm"},
    final_norm="model.final_layernorm",
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP, "mamba_proj_bias": MAMBA},
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(share=0.5),
    keys=_KEYS | words("attn_layer_indices num_logits_to_keep z_loss_coefficient"),
)


def _resolve_falcon(config: Mapping[str, Any]) -> dict[str, Any]:
    """Split the two factors of the MLP into separate keys."""
    gate, down = numbers(config, "mlp_multipliers", 2) or (1.0, 1.0)
    _falcon_mamba(config)  # whose sizes are checked
    return {**config, "gate_multiplier": gate, "down_multiplier": down}


def _falcon_layers(model: Architecture) -> list[Layer]:
    return usual_layers(model, [Parallel(_falcon_mamba(model.config), attention(model))] * model.dims.layers)


def _falcon_mamba(config: Mapping[str, Any]) -> Mamba2:
    inner = config.get("mamba_d_ssm", 1024)
    inner = (
        size(config, "mamba_expand", 2) * size(config, "hidden_size")
        if inner is None
        else size({"mamba_d_ssm": inner}, "mamba_d_ssm")
    )
    place = "before the gate" if config.get("mamba_norm_before_gate", True) else "behind the gate"
    return replace(
        _mamba(config, inner, place if config.get("mamba_rms_norm", False) else None),
        factors=numbers(config, "ssm_multipliers", 5) or (),
        open_output=False,
        output_bias=bool(config.get("projectors_bias", False)),
    )


FALCON_H1 = Family(
    name="falcon_h1",
    architectures=("FalconH1ForCausalLM",),
    resolve=_resolve_falcon,
    layers=_falcon_layers,
    blocks=(Mamba2,),
    fused={f"feed_forward.{role}": (role,) for role in MLP},
    norms={"attn": "input_layernorm", "mlp": "pre_ff_layernorm"},
    final_norm="model.final_layernorm",
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP, "mamba_proj_bias": ("mamba_in_proj",)},
    embedding_scale=Number("embedding_multiplier", 1.0),
    logit_scale=Number("lm_head_multiplier", 1.0),
    input_factors={
        **dict.fromkeys(QKV, Number("attention_in_multiplier", 1.0)),
        "mamba_in_proj": Number("ssm_in_multiplier", 1.0),
    },
    output_factors={
        "k_proj": Number("key_multiplier", 1.0),
        "o_proj": Number("attention_out_multiplier", 1.0),
        "mamba_out_proj": Number("ssm_out_multiplier", 1.0),
        "gate_proj": Number("gate_multiplier", 1.0),
        "down_proj": Number("down_multiplier", 1.0),
    },
    eps=Number("rms_norm_eps", 1e-5),
    keys=_KEYS
    | words(
        "mamba_d_ssm mamba_norm_before_gate mamba_rms_norm mlp_multipliers mlp_expansion_factor num_logits_to_keep "
        "projectors_bias ssm_multipliers"
    ),
    fixed={"mamba_use_mlp": (True,)},
)
