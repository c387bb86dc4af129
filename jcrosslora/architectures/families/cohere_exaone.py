"""Cohere and EXAONE 4: if some layers have windows, the layers of full attention have no positions.

Cohere 1 and 2 (Command R, Aya, Command R7B, Command A) have parallel blocks with one norm. The query and key norms of
Command R+ are not supported. With experts (Command A+, North), layers of full attention with a dense MLP may have
positions, norms may be RMS norms, and shared experts may be averaged with the others. EXAONE 4 has norms only after
attention and MLP; `exaone_moe` has them before, and experts after the first layers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jcrosslora.architectures.blocks import ATTENTION
from jcrosslora.architectures.config import FULL, SLIDING, Number, layer_count, refuse, size, words
from jcrosslora.architectures.expert_rules import ExpertRules, behind_first, by_list, layouts_with, shared_width
from jcrosslora.architectures.family import POST_NORMS, PRE_NORMS, QK_NORMS, Family, Gguf, Positions, Windows, windowed
from jcrosslora.errors import CheckpointError

_LOGIT_SCALE = {"logit_scale": "logit_scale"}
_DENSE, _SHARED_COUNT = "first_k_dense_replace", "num_shared_experts"
_CHOSEN = 3  # `expert_gating_func` of a softmax over the chosen experts
_PERIOD, _PREFIX_PERIOD = "sliding_window_pattern", "prefix_dense_sliding_window_pattern"
# Keys of published configurations, with the behaviour that the classes hard-code.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "layer_switch": (4,),
    "order_of_interleaved_layers": ("local_attn_first",),
    "position_embedding_type": ("rope_gptj",),
    "rotary_pct": (1.0,),
    "use_embedding_sharing": (True,),
    "use_gated_activation": (True,),
    "use_parallel_block": (True,),
    "use_parallel_embedding": (False, True),
    "use_qk_norm": (False,),
}

_cohere = partial(
    Family,
    norms={"attn": "input_layernorm"},
    norm="layer",
    parallel=True,
    bias_keys={"attention_bias": ATTENTION},
    tied=True,
    eps=Number("layer_norm_eps", 1e-5),
    logit_scale=Number("logit_scale", 0.0625),
)

COHERE = _cohere(
    name="cohere",
    architectures=("CohereForCausalLM",),
    gguf=Gguf("command-r", numbers=_LOGIT_SCALE),
    positions=Positions(theta=500_000.0, interleaved=True),
    fixed={"use_qk_norm": (False,)},
)
COHERE2 = _cohere(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    gguf=Gguf("cohere2", numbers=_LOGIT_SCALE),
    windows=Windows(period=4, period_keys=("sliding_window_pattern", "_sliding_window_pattern")),
    positions=Positions(interleaved=True, rotated=windowed),
    fixed=_FIXED,
)


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the kinds of attention and MLP of each layer; the first layers have another period."""
    scaling = config.get("rope_scaling")
    if scaling:
        msg = f"config key 'rope_scaling' is {str(scaling)[:60]}, which the class does not read: state rope_parameters"
        raise CheckpointError(msg)
    layers, first = layer_count(config), _count(config, _DENSE)
    if first > layers:
        refuse(_DENSE, first, f"at most the {layers} layers")
    sliding = [
        (layer + 1) % size(config, _PREFIX_PERIOD, 1) != 0
        if layer < first
        else (layer - first + 1) % size(config, _PERIOD, 4) != 0
        for layer in range(layers)
    ]
    found = {
        "layer_types": [SLIDING if slides else FULL for slides in sliding],
        "mlp_layer_types": ["dense" if layer < first else "sparse" for layer in range(layers)],
    }
    return {**config, **{key: kinds for key, kinds in found.items() if config.get(key) is None}}


def _count(config: Mapping[str, Any], key: str) -> int:
    """Return a number that may be zero, the default."""
    return 0 if config.get(key) in (None, 0) else size(config, key)


def _shared_width(config: Mapping[str, Any]) -> int:
    return _count(config, _SHARED_COUNT) * size(config, "intermediate_size")


def _rotated(config: Mapping[str, Any], kinds: Sequence[str]) -> list[bool]:
    """Give positions to layers with windows, and to layers with a dense MLP if all of these have full attention."""
    dense = config.get(_PREFIX_PERIOD) == 1
    return [
        kind == SLIDING or (dense and mlp == "dense")
        for kind, mlp in zip(kinds, config["mlp_layer_types"], strict=True)  # of `_resolve`
    ]


def _from_gguf(stated: Mapping[str, Any], _held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the widths and the experts' scores; full-attention layers with a dense MLP are taken to have positions."""
    dense, slides = stated.get("feed_forward_length"), stated.get("attention.sliding_window_pattern")
    first = _count(stated, "leading_dense_block_count")
    if isinstance(slides, list) and len(set(slides[:first])) > 1:
        msg = "layers with a dense MLP are of sliding and of full attention, and which have positions is not stated: "
        raise CheckpointError(msg + "use the safetensors of the model")
    scale = stated.get("expert_weights_scale")
    if scale not in (None, 0.0, 1.0):
        raise CheckpointError(f"expert_weights_scale is {str(scale)[:60]}, which {COHERE2_MOE.name} does not have")
    return {
        "intermediate_size": size(stated, "expert_feed_forward_length", dense),
        "prefix_dense_intermediate_size": dense,
        # llama.cpp defaults to sigmoids.
        "expert_selection_fn": "softmax" if stated.get("expert_gating_func") == _CHOSEN else "sigmoid",
    }


COHERE2_MOE = _cohere(
    name="cohere2_moe",
    architectures=("Cohere2MoeForCausalLM",),
    gguf=Gguf(
        "cohere2moe",
        counts={_SHARED_COUNT: "expert_shared_count", _DENSE: "leading_dense_block_count"},
        numbers=_LOGIT_SCALE,
        implied={"shared_expert_combination_strategy": "average", _PREFIX_PERIOD: 1},
        settings=_from_gguf,
    ),
    width_key="prefix_dense_intermediate_size",
    rms_key="rms_norm_eps",
    resolve=_resolve,
    experts=ExpertRules(
        ("num_experts",),
        width="intermediate_size",
        scores="chosen",
        scores_key="expert_selection_fn",
        scores_names={"softmax": "chosen", "sigmoid": "chosen sigmoid"},
        normalised="norm_topk_prob",
        sum_eps=0.0,
        layers=by_list,
        shared=_shared_width,
        averaged=("shared_expert_combination_strategy", "average"),
    ),
    windows=Windows(period=4, period_keys=(_PERIOD,)),
    positions=Positions(interleaved=True, rotated=_rotated),
    keys=words(
        "first_k_dense_replace mlp_layer_types num_nextn_predict_layers num_shared_experts "
        "prefix_dense_sliding_window_pattern"
    ),
    fixed={**_FIXED, "shared_expert_combination_strategy": ("average", "sum")},
    # Defaults of the class.
    defaults={
        "head_dim": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "prefix_dense_sliding_window_pattern": 1,
        "shared_expert_combination_strategy": "average",
    },
)


_CORRECTION = "e_score_correction_bias"


def _sparse(config: Mapping[str, Any], layers: int) -> Sequence[bool]:
    rule = by_list if config.get("mlp_layer_types") is not None else behind_first("first_k_dense_replace")
    return rule(config, layers)


def _exaone_rotated(config: Mapping[str, Any], kinds: Sequence[str]) -> list[bool]:
    """Give positions to layers with windows, or to all layers if the model has no windows."""
    return [kind == SLIDING or config.get("sliding_window", 4096) is None for kind in kinds]


def _exaone_from_gguf(stated: Mapping[str, Any], _held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the kinds of layers of a model without windows; other models state them as usual."""
    if stated.get("attention.sliding_window"):
        return {}
    layers = size(stated, "block_count") - (stated.get("nextn_predict_layers") or 0)
    return {"layer_types": [FULL] * layers}


_exaone = partial(
    Family,
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(period=4, period_keys=("sliding_window_pattern",)),
    positions=Positions(rotated=_exaone_rotated),
)

EXAONE4 = _exaone(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    gguf=Gguf("exaone4", settings=_exaone_from_gguf),
    norms=POST_NORMS | QK_NORMS,
)
EXAONE_MOE = _exaone(
    name="exaone_moe",
    architectures=("ExaoneMoeForCausalLM",),
    gguf=Gguf(
        "exaone-moe",
        counts={"num_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count"},
        settings=_exaone_from_gguf,
    ),
    norms=PRE_NORMS | QK_NORMS,
    experts=ExpertRules(
        ("num_experts", "num_local_experts"),
        layouts=layouts_with({"correction": f"mlp.{_CORRECTION}"}, {"correction": f"mlp.gate.{_CORRECTION}"}),
        scores="sigmoid",
        normalised="norm_topk_prob",
        scale=Number("routed_scaling_factor", 2.5),
        groups=("n_group", "topk_group"),
        layers=_sparse,
        shared=shared_width("num_shared_experts"),
    ),
    keys=words("first_k_dense_replace mlp_layer_types num_nextn_predict_layers num_shared_experts"),
    defaults={"first_k_dense_replace": 1, "num_shared_experts": 1, "norm_topk_prob": True},
)
