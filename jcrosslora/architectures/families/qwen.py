"""Qwen2 and Qwen3, dense and with experts; and Qwen3.5 and Qwen3-Next.

The latter two have the gated delta rule in three of four layers, and gated attention in the others. Qwen3.5 is dense or
has experts in all layers; Qwen3-Next has experts, and different projections before the delta rule.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from jcrosslora.architectures.architecture import Architecture, Layer, attention, usual_layers
from jcrosslora.architectures.blocks import ATTENTION, GATED_ATTENTION, QKV, SHARED, DeltaRule
from jcrosslora.architectures.config import FULL, LINEAR, check_multiple, layer_count, layer_kinds, size, words
from jcrosslora.architectures.expert_rules import ExpertRules, by_step, in_all_layers
from jcrosslora.architectures.family import PRE_NORMS, QK_NORMS, Family, Gguf, Positions, Windows
from jcrosslora.errors import CheckpointError

_WINDOWS = Windows(switch="use_sliding_window", first=("max_window_layers", 28))

QWEN2 = Family(name="qwen2", architectures=("Qwen2ForCausalLM",), gguf=Gguf("qwen2"), biases=QKV, windows=_WINDOWS)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf=Gguf("qwen3"),
    norms=PRE_NORMS | QK_NORMS,
    bias_keys={"attention_bias": ATTENTION},
    windows=_WINDOWS,
    defaults={"head_dim": 128},
)

_STEP = words("decoder_sparse_step mlp_only_layers")  # read by `by_step`
_EXPERTS = ExpertRules(("num_experts", "num_local_experts"), normalised="norm_topk_prob", layers=by_step)
_SHARED_WIDTH = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}


def _shared_width(config: Mapping[str, Any]) -> int:
    return size(config, "shared_expert_intermediate_size")


# One expert for all tokens, with a gate on its output.
_SHARED_EXPERT: dict[str, Any] = {"shared": _shared_width, "shared_gate": True}
_SHARED_PATHS = {f"mlp.shared_expert.{role.removeprefix('shared_')}": (role,) for role in SHARED}

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    gguf=Gguf("qwen3moe", implied={"norm_topk_prob": True}),
    norms=PRE_NORMS | QK_NORMS,
    bias_keys={"attention_bias": ATTENTION},
    experts=_EXPERTS,
    windows=Windows(switch="use_sliding_window", listed=False),
    keys=_STEP,
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    gguf=Gguf("qwen2moe", counts=_SHARED_WIDTH, implied={"norm_topk_prob": False}),
    fused=_SHARED_PATHS,
    bias_keys={"qkv_bias": QKV},
    experts=replace(_EXPERTS, **_SHARED_EXPERT),
    keys=_STEP | words("sliding_window layer_types shared_expert_intermediate_size"),
    # Windows would be in other layers than in Qwen2.
    fixed={"use_sliding_window": (False,)},
    defaults={"qkv_bias": True, "shared_expert_intermediate_size": 5632},
)


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the kinds of layers, and remove the position axes of multimodal rope, which are equal in text."""
    period, layers = size(config, "full_attention_interval", 4), layer_count(config)
    kinds = layer_kinds(config, {LINEAR: LINEAR, FULL: FULL})
    found = {**config, "layer_types": kinds or [LINEAR if (i + 1) % period else FULL for i in range(layers)]}
    _delta(found)  # whose sizes are checked
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(key), Mapping):
            found[key] = {name: one for name, one in found[key].items() if not name.startswith("mrope_")}
    return found


def _resolve_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the width of the MLP too; the only MLP is the shared expert."""
    return _resolve({**config, "intermediate_size": size(config, "shared_expert_intermediate_size", 512)})


def _delta(config: Mapping[str, Any]) -> DeltaRule:
    heads, groups = size(config, "linear_num_value_heads", 32), size(config, "linear_num_key_heads", 16)
    check_multiple("linear_num_value_heads", heads, "linear_num_key_heads", groups)
    return DeltaRule(
        size(config, "hidden_size"),
        size(config, "linear_conv_kernel_dim", 4),
        heads=heads,
        groups=groups,
        key_size=size(config, "linear_key_head_dim", 128),
        value_size=size(config, "linear_value_head_dim", 128),
    )


def _layers(model: Architecture, form: Literal["joined", "grouped"] = "joined") -> list[Layer]:
    delta, full = replace(_delta(model.config), form=form), attention(model, gated=True)
    # Of `_resolve`.
    return usual_layers(model, [delta if kind == LINEAR else full for kind in model.config["layer_types"]])


def _from_gguf(stated: Mapping[str, Any], _held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the kinds of layers and the size of a value head."""
    heads, inner = size(stated, "ssm.time_step_rank"), size(stated, "ssm.inner_size")
    found: dict[str, Any] = {"linear_value_head_dim": max(inner // heads, 1)}
    flags = stated.get("attention.recurrent_layers")
    if flags is None:
        return found | {"full_attention_interval": size(stated, "full_attention_interval", 4)}
    layers = size(stated, "block_count") - (stated.get("nextn_predict_layers") or 0)
    if not isinstance(flags, list) or len(flags) < layers:
        raise CheckpointError(f"attention.recurrent_layers is {str(flags)[:60]}, expected a flag for each layer")
    return found | {"layer_types": [LINEAR if flag else FULL for flag in flags[:layers]]}


_OF_DELTA = {
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_norm.weight": "linear_attn.norm.weight",
}
_SIZES = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
_gguf = partial(
    Gguf, names={"mlp": "post_attention_norm"}, tensors=_OF_DELTA, counts=_SIZES | _SHARED_WIDTH, settings=_from_gguf
)

_NEXT_KEYS = words(
    "layer_types full_attention_interval linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim "
    "linear_num_key_heads linear_num_value_heads mamba_ssm_dtype mtp_num_hidden_layers mtp_use_dedicated_embeddings"
)
_qwen = partial(
    Family,
    layers=_layers,
    blocks=(DeltaRule,),
    norms=PRE_NORMS | QK_NORMS,
    gain_offset=1.0,
    bias_keys={"attention_bias": GATED_ATTENTION},
    positions=Positions(share=0.25),
)

QWEN3_5 = _qwen(
    name="qwen3_5_text",
    architectures=("Qwen3_5ForCausalLM",),
    gguf=_gguf("qwen35", tiled=True, counts=_SIZES),
    resolve=_resolve,
    keys=_NEXT_KEYS,
    fixed={"attn_output_gate": (True,), "mlp_only_layers": ([],)},
    defaults={"head_dim": 256},
)
QWEN3_5_MOE = _qwen(
    name="qwen3_5_moe_text",
    architectures=("Qwen3_5MoeForCausalLM",),
    gguf=_gguf("qwen35moe", tiled=True),
    fused=_SHARED_PATHS,
    resolve=_resolve_moe,
    experts=replace(_EXPERTS, normalised=True, layers=in_all_layers, **_SHARED_EXPERT),
    keys=_NEXT_KEYS | {"shared_expert_intermediate_size"},
    fixed={"attn_output_gate": (True,), "mlp_only_layers": ([],), "norm_topk_prob": (True,)},
    defaults={
        "head_dim": 256,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    },
)
QWEN3_NEXT = _qwen(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    gguf=_gguf(
        "qwen3next",
        tensors=_OF_DELTA | dict.fromkeys(("attn_qkv.weight", "attn_gate.weight"), "linear_attn.in_proj_qkvz.weight"),
        implied={"norm_topk_prob": True},
    ),
    fused=_SHARED_PATHS,
    resolve=_resolve,
    layers=partial(_layers, form="grouped"),
    experts=replace(_EXPERTS, **_SHARED_EXPERT),
    keys=_NEXT_KEYS | _STEP | {"shared_expert_intermediate_size"},
    defaults={
        "head_dim": 256,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
    },
)
