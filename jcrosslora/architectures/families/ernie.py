"""ERNIE 4.5, dense and with experts: Llama that rotates neighbouring features."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.architectures.expert_rules import FUSED, MERGED, PUBLISHED, ExpertRules, shared_width
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.keys import words
from jcrosslora.architectures.names import ATTENTION, MLP
from jcrosslora.architectures.rules import Gguf, Positions
from jcrosslora.architectures.sizes import Number, size
from jcrosslora.errors import CheckpointError

_CORRECTION = "moe_statics.e_score_correction_bias"


def _sparse(config: Mapping[str, Any], layers: int) -> list[bool]:
    interval, start, end = size(config, "moe_layer_interval", 1), *_ends(config)
    last = layers - 1 if end == -1 else end
    return [start <= layer <= last and (layer + 1) % interval == 0 for layer in range(layers)]


def _ends(config: Mapping[str, Any]) -> tuple[int, int]:
    start, end = config.get("moe_layer_start_index"), config.get("moe_layer_end_index")
    if not isinstance(start, int) or not isinstance(end, int) or min(start, end) < -1:
        msg = f"config keys moe_layer_start_index and moe_layer_end_index are {start!r} and {end!r}, wanted layers"
        raise CheckpointError(msg)
    return start, end


ERNIE4_5 = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    gguf=Gguf("ernie4_5"),
    bias_keys={"use_bias": (*ATTENTION, *MLP)},
    tied=True,
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(theta=500_000.0, interleaved=True),
    keys=words("use_bias"),
    fixed={"compression_ratio": (1.0,)},
    defaults={"head_dim": 128},
)
ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    gguf=Gguf(
        "ernie4_5-moe",
        counts={
            "moe_num_shared_experts": "expert_shared_count",
            "moe_layer_start_index": "leading_dense_block_count",
            "moe_layer_interval": "interleave_moe_layer_step",
        },
    ),
    experts=ExpertRules(
        ("moe_num_experts", "num_experts", "num_local_experts"),
        used="moe_k",
        layouts=(
            PUBLISHED | {"correction": f"mlp.{_CORRECTION}"},
            MERGED | {"correction": f"mlp.{_CORRECTION}"},
            FUSED | {"correction": f"mlp.gate.{_CORRECTION}"},
        ),
        correction_axes=2,
        layers=_sparse,
        shared=shared_width("moe_num_shared_experts"),
    ),
    tied=True,
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(theta=500_000.0, interleaved=True),
    keys=words(
        "moe_num_experts num_experts num_local_experts moe_k moe_intermediate_size moe_num_shared_experts "
        "moe_layer_start_index moe_layer_end_index moe_layer_interval moe_norm_min output_router_logits "
        "router_aux_loss_coef num_nextn_predict_layers moe_capacity"
    ),
    # With biases its output head has one too.
    fixed={"use_bias": (False,), "moe_gate": ("topk",), "moe_use_aux_free": (True,)},
    defaults={"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
)
