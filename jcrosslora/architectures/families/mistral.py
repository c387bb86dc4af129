"""Mistral and its relatives.

Mistral and Ministral 3 are Llama with sliding windows in all layers; Ministral's queries grow with the position.
Mixtral is Mistral with experts in all layers. Mistral 4 is DeepSeek V3 with experts that are chosen by a softmax, and
queries that grow with the position.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jcrosslora.architectures.expert_rules import FUSED, MERGED, PUBLISHED, ExpertRules
from jcrosslora.architectures.families.deepseek_glm import DEEPSEEK_V3, EXPERTS, GGUF, KEYS, from_gguf
from jcrosslora.architectures.family import Family, Gguf, Positions, Windows
from jcrosslora.architectures.names import words
from jcrosslora.architectures.sizes import Number, size
from jcrosslora.errors import CheckpointError

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    windows=Windows(listed=False),
    keys=frozenset({"sliding_window", "layer_types"}),
)
MINISTRAL3 = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    gguf=Gguf("mistral3", permuted=True),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(
        grows=True,
        settings={
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    keys=frozenset({"sliding_window", "layer_types"}),
    defaults={"head_dim": 128},
)
_MIXTRAL_BLOCK = "block_sparse_moe"
MIXTRAL_EXPERTS = {
    "router": f"{_MIXTRAL_BLOCK}.gate.weight",
    "gate": f"{_MIXTRAL_BLOCK}.experts.{{}}.w1.weight",
    "up": f"{_MIXTRAL_BLOCK}.experts.{{}}.w3.weight",
    "down": f"{_MIXTRAL_BLOCK}.experts.{{}}.w2.weight",
}

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    experts=ExpertRules(
        ("num_local_experts", "num_experts"), width="intermediate_size", layouts=(MIXTRAL_EXPERTS, MERGED, FUSED)
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(theta=1_000_000.0),
    keys=words(
        "sliding_window layer_types num_local_experts num_experts num_experts_per_tok output_router_logits "
        "router_aux_loss_coef router_jitter_noise"
    ),
)
_GROWTH = 0.1


def _resolve4(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the rope settings the share of a head with positions, which its sizes state.

    Raises:
        CheckpointError: it is another share than that of the sizes, with which the class does not run.
    """
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


def _from_gguf4(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the sizes of attention; a head is the whole of it, and not the part with positions."""
    found = from_gguf(stated, held)
    return {**found, "head_dim": found["qk_nope_head_dim"] + found["qk_rope_head_dim"]}


MISTRAL4 = replace(
    DEEPSEEK_V3,
    name="mistral4",
    architectures=("Mistral4ForCausalLM",),
    # The converter writes nothing on how queries grow, so that llama.cpp does not let them; it is taken to be what the
    # class has where nothing is stated.
    gguf=replace(GGUF, architecture="mistral4", rope={"llama_4_scaling_beta": _GROWTH}, settings=_from_gguf4),
    resolve=_resolve4,
    experts=replace(
        EXPERTS,
        count=("n_routed_experts", "num_local_experts"),
        layouts=(PUBLISHED, FUSED),
        scores="softmax",
        scale=Number("routed_scaling_factor", 1.0),
    ),
    positions=Positions(
        interleaved=True,
        grows=True,
        settings={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 128.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": _GROWTH,
        },
    ),
    keys=KEYS | {"norm_topk_prob"},
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
