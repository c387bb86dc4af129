"""Hunyuan V1 and ERNIE 4.5, dense and with experts.

Hunyuan is Llama with queries and keys normalised after the rotation. With experts (A13B), every layer also has a shared
MLP as wide as one expert. ERNIE 4.5 is Llama with neighbouring features rotated.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jcrosslora.architectures.blocks import ATTENTION, MLP, SHARED
from jcrosslora.architectures.config import Number, layer_count, refuse, size, words
from jcrosslora.architectures.expert_rules import ExpertRules, layouts_with, shared_width
from jcrosslora.architectures.family import PRE_NORMS, Family, Gguf, Positions
from jcrosslora.errors import CheckpointError

# Keys of published configurations that the classes do not read.
_KEYS = words(
    "attention_head_dim cla_share_factor class_num dense_list eod_token_id im_end_id im_newline_id "
    "im_start_id mask_init_id org_vocab_size pad_id pool_type text_end_id text_start_id"
)
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "add_classification_head": (False,),
    "mlp_bias": (False,),
    "norm_type": ("rms", "hf_rms"),
    "pretraining_tp": (1,),
    "use_cla": (False,),
    "use_qk_norm": (True,),
    "use_rotary_pos_emb": (True,),
}

_hunyuan = partial(
    Family,
    norms=PRE_NORMS | {"q": "self_attn.query_layernorm", "k": "self_attn.key_layernorm"},
    qk_norms="rotated",
    bias_keys={"attention_bias": ATTENTION},
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(types=("dynamic",)),
)


def _same_in_all_layers(config: Mapping[str, Any], key: str) -> Any:
    """Return a value that may be stated once or per layer; raise CheckpointError if layers differ."""
    stated, layers = config.get(key), layer_count(config)
    if not isinstance(stated, list | tuple):
        return stated
    if len(stated) < layers or any(value != stated[0] for value in stated[:layers]):
        refuse(key, stated, f"the same number for each of {layers} layers")
    return stated[0]


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce the number of experts per token, which may be stated per layer, to one number."""
    own = {"moe_intermediate_size": size(config, "intermediate_size"), "num_shared_expert": 1}
    for key, wanted in own.items():
        stated = _same_in_all_layers(config, key)
        if stated not in (None, wanted):
            refuse(key, stated, f"{wanted}, as in the class")
    used = _same_in_all_layers(config, "moe_topk")
    other = config.get("num_experts_per_tok")
    if None not in (used, other) and used != other:
        msg = f"config keys 'moe_topk' and 'num_experts_per_tok' are {used} and {other}, expected one number"
        raise CheckpointError(msg)
    used = other if used is None else used
    return {**config, "moe_topk": 1 if used is None else used}


HUNYUAN_V1_DENSE = _hunyuan(
    name="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    gguf=Gguf("hunyuan-dense"),
    keys=_KEYS,
    fixed={**_FIXED, "num_experts": (1,)},
)
HUNYUAN_V1_MOE = _hunyuan(
    name="hunyuan_v1_moe",
    architectures=("HunYuanMoEV1ForCausalLM",),
    gguf=Gguf("hunyuan-moe"),
    fused={f"mlp.shared_mlp.{role.removeprefix('shared_')}": (role,) for role in SHARED},
    resolve=_resolve,
    experts=ExpertRules(
        ("num_experts", "num_local_experts"),
        used="moe_topk",
        width="intermediate_size",
        layouts=layouts_with({"router": "mlp.gate.wg.weight"}),
        sum_eps=0.0,
        shared=lambda config: size(config, "intermediate_size"),
    ),
    # Sizes of latent attention and groups of experts only matter with `use_mla` and `group_limited_greedy`.
    keys=_KEYS
    | words(
        "kv_lora_rank moe_intermediate_size n_group num_experts_per_tok num_shared_expert q_lora_rank "
        "qk_nope_head_dim qk_rope_head_dim topk_group v_head_dim"
    ),
    # What the class always does, or never.
    fixed={
        **_FIXED,
        "group_limited_greedy": (False,),
        "moe_drop_tokens": (False,),
        "moe_layer_num_skipped": (0,),
        "moe_random_routing_dropped_token": (False,),
        "norm_topk_prob": (True,),
        "position_embedding_xdrope": (False,),
        "routed_scaling_factor": (1.0,),
        "use_mixed_mlp_moe": (True,),
        "use_mla": (False,),
    },
    defaults={"num_experts": 1},
)


_CORRECTION = "moe_statics.e_score_correction_bias"


def _sparse(config: Mapping[str, Any], layers: int) -> list[bool]:
    interval, start, end = size(config, "moe_layer_interval", 1), *_ends(config)
    last = layers - 1 if end == -1 else end
    return [start <= layer <= last and (layer + 1) % interval == 0 for layer in range(layers)]


def _ends(config: Mapping[str, Any]) -> tuple[int, int]:
    start, end = config.get("moe_layer_start_index"), config.get("moe_layer_end_index")
    if not isinstance(start, int) or not isinstance(end, int) or min(start, end) < -1:
        msg = f"config keys moe_layer_start_index and moe_layer_end_index are {start!r} and {end!r}, expected layers"
        raise CheckpointError(msg)
    return start, end


_ernie = partial(
    Family, tied=True, eps=Number("rms_norm_eps", 1e-5), positions=Positions(theta=500_000.0, interleaved=True)
)
ERNIE4_5 = _ernie(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    gguf=Gguf("ernie4_5"),
    bias_keys={"use_bias": (*ATTENTION, *MLP)},
    fixed={"compression_ratio": (1.0,)},
    defaults={"head_dim": 128},
)
ERNIE4_5_MOE = _ernie(
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
        layouts=layouts_with({"correction": f"mlp.{_CORRECTION}"}, {"correction": f"mlp.gate.{_CORRECTION}"}),
        correction_axes=2,
        layers=_sparse,
        shared=shared_width("moe_num_shared_experts"),
    ),
    keys=words(
        "moe_num_shared_experts moe_layer_start_index moe_layer_end_index moe_layer_interval moe_norm_min "
        "num_nextn_predict_layers moe_capacity"
    ),
    # With `use_bias`, the output head would have a bias too.
    fixed={"use_bias": (False,), "moe_gate": ("topk",), "moe_use_aux_free": (True,)},
    defaults={"moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
)
