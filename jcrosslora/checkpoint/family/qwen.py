"""Qwen2 and Qwen3, dense and with experts."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.checkpoint.family.experts import FUSED, MERGED, PUBLISHED, Experts, by_step
from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, DENSE_ROLES, QKV, SHARED
from jcrosslora.checkpoint.family.record import PRE_NORMS, QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, RoleShape, Windows
from jcrosslora.checkpoint.family.sizes import size

_WINDOWS = Windows(switch="use_sliding_window", first=("max_window_layers", 28))
_KEYS = frozenset({"sliding_window", "layer_types", "use_sliding_window"})

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf=Gguf("qwen2"),
    biases=QKV,
    windows=_WINDOWS,
    keys=_KEYS,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf=Gguf("qwen3"),
    norms=PRE_NORMS | QK_NORMS,
    bias_keys={"attention_bias": ATTENTION},
    windows=_WINDOWS,
    keys=_KEYS | {"attention_bias"},
    defaults={"head_dim": 128},
)

EXPERT_KEYS = words(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step "
    "mlp_only_layers output_router_logits router_aux_loss_coef"
)
EXPERTS = Experts(("num_experts", "num_local_experts"), layouts=(PUBLISHED, MERGED, FUSED), normalised="norm_topk_prob")
SHARED_WIDTH = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}


def _shared_width(config: Mapping[str, Any]) -> int:
    return size(config, "shared_expert_intermediate_size")


# One expert that all tokens go through, with a gate on what it returns.
SHARED_ROLES = (*SHARED, "shared_expert_gate")
SHARED_PATHS = {f"mlp.shared_expert.{role.removeprefix('shared_')}": (role,) for role in SHARED}
SHARED_SHAPES: dict[str, RoleShape] = {
    "shared_gate_proj": lambda sizes, config: (_shared_width(config), sizes.hidden),
    "shared_up_proj": lambda sizes, config: (_shared_width(config), sizes.hidden),
    "shared_down_proj": lambda sizes, config: (sizes.hidden, _shared_width(config)),
    "shared_expert_gate": lambda sizes, _: (1, sizes.hidden),
}

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    gguf=Gguf("qwen3moe", implied={"norm_topk_prob": True}),
    norms=PRE_NORMS | QK_NORMS,
    bias_keys={"attention_bias": ATTENTION},
    parts=by_step,
    experts=EXPERTS,
    windows=Windows(switch="use_sliding_window", listed=False),
    keys=_KEYS | {"attention_bias"} | EXPERT_KEYS,
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    gguf=Gguf("qwen2moe", counts=SHARED_WIDTH, implied={"norm_topk_prob": False}),
    roles=(*DENSE_ROLES, *SHARED_ROLES),
    fused=SHARED_PATHS,
    shapes=SHARED_SHAPES,
    bias_keys={"qkv_bias": QKV},
    parts=by_step,
    experts=EXPERTS,
    keys=words("sliding_window layer_types qkv_bias shared_expert_intermediate_size") | EXPERT_KEYS,
    # Its windows are those of other layers than in Qwen2.
    fixed={"use_sliding_window": (False,)},
    defaults={"qkv_bias": True, "shared_expert_intermediate_size": 5632},
)
