"""Qwen2 and Qwen3, dense and with experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jcrosslora.architectures.expert_rules import FUSED, MERGED, PUBLISHED, ExpertRules, by_step
from jcrosslora.architectures.family import PRE_NORMS, QK_NORMS, Family
from jcrosslora.architectures.keys import words
from jcrosslora.architectures.names import ATTENTION, QKV, SHARED
from jcrosslora.architectures.rules import Gguf, Windows
from jcrosslora.architectures.sizes import size

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
EXPERTS = ExpertRules(
    ("num_experts", "num_local_experts"),
    layouts=(PUBLISHED, MERGED, FUSED),
    normalised="norm_topk_prob",
    layers=by_step,
)
SHARED_WIDTH = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}


def _shared_width(config: Mapping[str, Any]) -> int:
    return size(config, "shared_expert_intermediate_size")


# One expert that all tokens go through, with a gate on what it returns.
SHARED_EXPERT: dict[str, Any] = {"shared": _shared_width, "shared_gate": True}
SHARED_PATHS = {f"mlp.shared_expert.{role.removeprefix('shared_')}": (role,) for role in SHARED}

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    gguf=Gguf("qwen3moe", implied={"norm_topk_prob": True}),
    norms=PRE_NORMS | QK_NORMS,
    bias_keys={"attention_bias": ATTENTION},
    experts=EXPERTS,
    windows=Windows(switch="use_sliding_window", listed=False),
    keys=_KEYS | {"attention_bias"} | EXPERT_KEYS,
)
QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    gguf=Gguf("qwen2moe", counts=SHARED_WIDTH, implied={"norm_topk_prob": False}),
    fused=SHARED_PATHS,
    bias_keys={"qkv_bias": QKV},
    experts=replace(EXPERTS, **SHARED_EXPERT),
    keys=words("sliding_window layer_types qkv_bias shared_expert_intermediate_size") | EXPERT_KEYS,
    # Its windows are those of other layers than in Qwen2.
    fixed={"use_sliding_window": (False,)},
    defaults={"qkv_bias": True, "shared_expert_intermediate_size": 5632},
)
