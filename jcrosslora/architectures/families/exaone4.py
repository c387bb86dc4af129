"""EXAONE 4: norms behind attention and MLP alone; with windows, layers of full attention have no positions.

`exaone_moe` has its norms in front, and experts behind the first layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jcrosslora.architectures.expert_rules import (
    FUSED,
    MERGED,
    PUBLISHED,
    ExpertRules,
    behind_first,
    by_list,
    shared_width,
)
from jcrosslora.architectures.family import POST_NORMS, PRE_NORMS, QK_NORMS, Family
from jcrosslora.architectures.keys import words
from jcrosslora.architectures.rules import FULL, SLIDING, Gguf, Positions, Windows
from jcrosslora.architectures.sizes import Number, size

_CORRECTION = "e_score_correction_bias"


def _sparse(config: Mapping[str, Any], layers: int) -> Sequence[bool]:
    rule = by_list if config.get("mlp_layer_types") is not None else behind_first("first_k_dense_replace")
    return rule(config, layers)


def _rotated(config: Mapping[str, Any], kinds: Sequence[str]) -> list[bool]:
    """Give layers with windows positions, and without windows all."""
    return [kind == SLIDING or config.get("sliding_window", 4096) is None for kind in kinds]


def _from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the kinds of the layers of a model without windows; those of others are stated as usual."""
    del held
    if stated.get("attention.sliding_window"):
        return {}
    layers = size(stated, "block_count") - (stated.get("nextn_predict_layers") or 0)
    return {"layer_types": [FULL] * layers}


EXAONE4 = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    gguf=Gguf("exaone4", settings=_from_gguf),
    norms=POST_NORMS | QK_NORMS,
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(period=4, period_keys=("sliding_window_pattern",)),
    positions=Positions(rotated=_rotated),
    keys=words("sliding_window sliding_window_pattern layer_types"),
)
EXAONE_MOE = Family(
    name="exaone_moe",
    architectures=("ExaoneMoeForCausalLM",),
    gguf=Gguf(
        "exaone-moe",
        counts={"num_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count"},
        settings=_from_gguf,
    ),
    norms=PRE_NORMS | QK_NORMS,
    experts=ExpertRules(
        ("num_experts", "num_local_experts"),
        layouts=(
            PUBLISHED | {"correction": f"mlp.{_CORRECTION}"},
            MERGED | {"correction": f"mlp.{_CORRECTION}"},
            FUSED | {"correction": f"mlp.gate.{_CORRECTION}"},
        ),
        scores="sigmoid",
        normalised="norm_topk_prob",
        scale=Number("routed_scaling_factor", 2.5),
        groups=("n_group", "topk_group"),
        layers=_sparse,
        shared=shared_width("num_shared_experts"),
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(period=4, period_keys=("sliding_window_pattern",)),
    positions=Positions(rotated=_rotated),
    keys=words(
        "sliding_window sliding_window_pattern layer_types mlp_layer_types first_k_dense_replace num_experts "
        "num_local_experts num_shared_experts num_experts_per_tok moe_intermediate_size norm_topk_prob n_group "
        "topk_group routed_scaling_factor output_router_logits router_aux_loss_coef num_nextn_predict_layers"
    ),
    defaults={"first_k_dense_replace": 1, "num_shared_experts": 1, "norm_topk_prob": True},
)
