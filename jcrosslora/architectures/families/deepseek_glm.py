"""DeepSeek V2, V3 and R1, Mistral 4, and GLM; GLM 4.5 to 4.7 (`glm4_moe`) have DeepSeek's experts.

DeepSeek has latent attention: queries, and keys and values, are computed from low-rank latents, and only a part of each
head has positions; for keys that part is the same in all heads. V2 and Mistral 4 choose experts by a softmax; Mistral
4 scales queries up with the position. GLM-4 and GLM-4-0414 (`glm4`) rotate neighbouring features in half of each head,
and fuse gate and up; `glm4_moe` rotates features half a head apart.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from jcrosslora.architectures.architecture import Architecture, Layer, usual_layers
from jcrosslora.architectures.blocks import MLP, QKV, SHARED, LatentAttention
from jcrosslora.architectures.config import Number, size, words
from jcrosslora.architectures.expert_rules import (
    CORRECTION,
    FUSED,
    MERGED,
    PUBLISHED,
    ExpertRules,
    behind_first,
    layouts_with,
    shared_width,
)
from jcrosslora.architectures.family import PRE_NORMS, QK_NORMS, Family, Gguf, Positions, yarn
from jcrosslora.errors import CheckpointError


def _layers(model: Architecture) -> list[Layer]:
    config, dims = model.config, model.dims
    keys = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    rank = None if config.get("q_lora_rank") is None else size(config, "q_lora_rank")
    mixer = LatentAttention(dims.hidden, dims.heads, *(size(config, key) for key in keys), query_rank=rank)
    return usual_layers(model, [mixer] * dims.layers)


def _from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the attention sizes; older files have keys and values in one matrix and no `_mla` keys."""
    ends = "_mla" if "attention.key_length_mla" in stated else ""
    rotated = size(stated, "rope.dimension_count")
    direct = "self_attn.q_proj.weight" in held
    return {
        "q_lora_rank": None if direct else size(stated, "attention.q_lora_rank"),
        "kv_lora_rank": size(stated, "attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": size(stated, "attention.key_length" + ends) - rotated,
        "v_head_dim": size(stated, "attention.value_length" + ends),
        "num_key_value_heads": size(stated, "attention.head_count"),
        "head_dim": rotated,
    }


# Keys of all these families: keys that are read, and keys of published configurations that the classes ignore.
_KEYS = words(
    "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim qk_head_dim v_head_dim first_k_dense_replace "
    "num_experts n_shared_experts aux_loss_alpha seq_aux ep_size pretraining_tp"
)

# Of all these families; the architecture is that of V2 and V3, which differ in the scores of experts.
_GGUF = Gguf(
    "deepseek2",
    tensors=dict.fromkeys(("attn_k_b.weight", "attn_v_b.weight"), "self_attn.kv_b_proj.weight"),
    counts={"n_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count"},
    settings=_from_gguf,
)

_EXPERTS = ExpertRules(
    ("n_routed_experts", "num_experts", "num_local_experts"),
    layouts=layouts_with(CORRECTION),
    scores="sigmoid",
    normalised="norm_topk_prob",
    scale=Number("routed_scaling_factor", 2.5),
    groups=("n_group", "topk_group"),
    layers=behind_first("first_k_dense_replace"),
    shared=shared_width("n_shared_experts"),
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    gguf=_GGUF,
    norms=PRE_NORMS | {"q_a": "self_attn.q_a_layernorm", "kv_a": "self_attn.kv_a_layernorm"},
    bias_keys={"attention_bias": ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")},
    layers=_layers,
    blocks=(LatentAttention,),
    experts=_EXPERTS,
    positions=Positions(interleaved=True),
    keys=_KEYS | {"num_nextn_predict_layers"},
    fixed=dict(moe_layer_freq=(1,), rope_interleave=(True,), scoring_func=("sigmoid",), topk_method=("noaux_tc",)),
    # Defaults of the class, which published configurations omit.
    defaults=dict(
        n_shared_experts=1, first_k_dense_replace=3, norm_topk_prob=True, n_group=8, topk_group=4, q_lora_rank=1536
    ),
)


def _resolve_v2(config: Mapping[str, Any]) -> dict[str, Any]:
    """Set one group of experts if experts are chosen without groups."""
    if config.get("topk_method") == "greedy":
        return {**config, "n_group": 1, "topk_group": 1}
    return {**config, **{key: size(config, key) for key in ("n_group", "topk_group")}}


def _v2_from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the attention sizes, and how experts are chosen, by the number of groups in the file."""
    other = [key for key in ("expert_weights_norm", "attention.temperature_scale") if stated.get(key)]
    other += ["exp_probs_b"] if CORRECTION["correction"] in held else []
    if other:
        msg = f"its experts are chosen by a softmax, and it has {other[0]}: it is neither a DeepSeek V2 nor a V3"
        raise CheckpointError(msg)
    found, groups = _from_gguf(stated, held), stated.get("expert_group_count")
    if groups is None and found["q_lora_rank"] is not None:
        msg = "expert_group_count is missing, as in older files: published models of this form choose among "
        raise CheckpointError(msg + "groups of experts; convert the model again, or use its safetensors")
    return {**found, "topk_method": "greedy" if groups in (None, 1) else "group_limited_greedy"}


DEEPSEEK_V2 = replace(
    DEEPSEEK_V3,
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    gguf=replace(_GGUF, settings=_v2_from_gguf),
    resolve=_resolve_v2,
    bias_keys={**DEEPSEEK_V3.bias_keys, "mlp_bias": (*MLP, *SHARED)},
    experts=replace(
        _EXPERTS,
        count=("n_routed_experts", "num_experts"),
        layouts=(PUBLISHED, MERGED, FUSED),
        scores="softmax",
        normalised=False,
        scale=Number("routed_scaling_factor", 1.0),
        group_best=1,
    ),
    keys=_KEYS | {"num_local_experts"},
    # The class never divides the weights by their sum.
    fixed={
        "moe_layer_freq": (1,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
    },
    defaults={
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1407,
        "first_k_dense_replace": 0,
        "q_lora_rank": 1536,
        "topk_method": "greedy",
    },
)


_GROWTH = 0.1


def _resolve_mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove `partial_rotary_factor` from the rope settings after checking it: the head sizes imply it."""
    found = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        stated = config.get(key)
        if not isinstance(stated, Mapping) or stated.get("partial_rotary_factor") is None:
            continue
        plain, rotated = size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim")
        whole, share = size(config, "head_dim", plain + rotated), stated["partial_rotary_factor"]
        if not isinstance(share, int | float) or not 0 < share <= 1 or int(whole * share) != rotated:
            msg = f"partial_rotary_factor {str(share)[:60]!r} of {whole} features is not qk_rope_head_dim {rotated}"
            raise CheckpointError(msg)
        found[key] = {name: value for name, value in stated.items() if name != "partial_rotary_factor"}
    return found


def _gguf_of_mistral(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the attention sizes; `head_dim` is the whole head, not only the part with positions."""
    found = _from_gguf(stated, held)
    return {**found, "head_dim": found["qk_nope_head_dim"] + found["qk_rope_head_dim"]}


MISTRAL4 = replace(
    DEEPSEEK_V3,
    name="mistral4",
    architectures=("Mistral4ForCausalLM",),
    # The converter does not write the growth of queries, so llama.cpp does not apply it; the default of the class is
    # used.
    gguf=replace(_GGUF, architecture="mistral4", rope={"llama_4_scaling_beta": _GROWTH}, settings=_gguf_of_mistral),
    resolve=_resolve_mistral,
    experts=replace(
        _EXPERTS,
        count=("n_routed_experts", "num_local_experts"),
        layouts=(PUBLISHED, FUSED),
        scores="softmax",
        scale=Number("routed_scaling_factor", 1.0),
    ),
    positions=Positions(
        interleaved=True,
        grows=True,
        settings=yarn(128.0, 8192, 10_000.0, mscale_all_dim=1.0, mscale=1.0, llama_4_scaling_beta=_GROWTH),
    ),
    keys=_KEYS,
    fixed={"rope_interleave": (True,)},
    defaults={
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
        "q_lora_rank": 1024,
        "kv_lora_rank": 256,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 128,
    },
)


_glm = partial(
    Family,
    fused={"mlp.gate_up_proj": ("gate_proj", "up_proj")},
    bias_keys={"attention_bias": QKV},
    eps=Number("rms_norm_eps", 1.5625e-7),
    positions=Positions(share=0.5, interleaved=True),
    defaults={"head_dim": 128, "attention_bias": True},
)

GLM = _glm(name="glm", architectures=("GlmForCausalLM",))
GLM4 = _glm(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    gguf=Gguf("glm4"),
    norms=PRE_NORMS | {"attn_post": "post_self_attn_layernorm", "mlp_post": "post_mlp_layernorm"},
)
GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    gguf=Gguf(
        "glm4moe",
        names={"mlp": "post_attention_norm"},
        counts={"n_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count"},
    ),
    norms=PRE_NORMS | QK_NORMS,
    qk_norm_key="use_qk_norm",
    bias_keys={"attention_bias": QKV},
    experts=replace(_EXPERTS, scale=Number("routed_scaling_factor", 1.0)),
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(share=0.5),
    keys=words("first_k_dense_replace n_shared_experts num_nextn_predict_layers"),
    defaults={"first_k_dense_replace": 1, "n_shared_experts": 1, "norm_topk_prob": True},
)
