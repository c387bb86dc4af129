"""EXAONE 4: norms behind attention and MLP alone; with windows, layers of full attention have no positions.

`exaone_moe` has its norms in front, and experts behind the first layers.
"""

from collections.abc import Mapping
from typing import Any

from jcrosslora.checkpoint.family.experts import (
    FUSED,
    MERGED,
    PUBLISHED,
    Experts,
    behind_first,
    by_list,
    shared_shapes,
)
from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import DENSE_ROLES, SHARED
from jcrosslora.checkpoint.family.parts import LayerParts
from jcrosslora.checkpoint.family.record import POST_NORMS, PRE_NORMS, QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions, Windows

_CORRECTION = "e_score_correction_bias"


def _parts(config: Mapping[str, Any], layers: int) -> list[LayerParts]:
    rule = by_list if config.get("mlp_layer_types") is not None else behind_first("first_k_dense_replace")
    return rule(config, layers)


EXAONE4 = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    gguf=Gguf("exaone4"),
    norms=POST_NORMS | QK_NORMS,
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(period=4, period_keys=("sliding_window_pattern",)),
    positions=Positions(unrotated="full beside windows"),
    keys=words("sliding_window sliding_window_pattern layer_types"),
)
EXAONE_MOE = Family(
    name="exaone_moe",
    architectures=("ExaoneMoeForCausalLM",),
    gguf=Gguf(
        "exaone-moe",
        counts={"num_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count"},
    ),
    roles=(*DENSE_ROLES, *SHARED),
    shapes=shared_shapes("num_shared_experts"),
    norms=PRE_NORMS | QK_NORMS,
    parts=_parts,
    experts=Experts(
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
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(period=4, period_keys=("sliding_window_pattern",)),
    positions=Positions(unrotated="full beside windows"),
    keys=words(
        "sliding_window sliding_window_pattern layer_types mlp_layer_types first_k_dense_replace num_experts "
        "num_local_experts num_shared_experts num_experts_per_tok moe_intermediate_size norm_topk_prob n_group "
        "topk_group routed_scaling_factor output_router_logits router_aux_loss_coef num_nextn_predict_layers"
    ),
    defaults={"first_k_dense_replace": 1, "num_shared_experts": 1, "norm_topk_prob": True},
)
