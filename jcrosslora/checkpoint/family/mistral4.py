"""Mistral 4: DeepSeek V3 with experts that are chosen by a softmax, and queries that grow with the position."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jcrosslora.checkpoint.family.deepseek import DEEPSEEK_V3, GGUF, KEYS, from_gguf, latent_sizes
from jcrosslora.checkpoint.family.experts import FUSED, PUBLISHED, Experts
from jcrosslora.checkpoint.family.rules import Number, Positions
from jcrosslora.checkpoint.family.sizes import size
from jcrosslora.errors import CheckpointError

_GROWTH = 0.1


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of the rope settings the share of a head with positions, which its sizes state.

    Raises:
        CheckpointError: it is another share than that of the sizes, with which the class does not run.
    """
    found = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        stated = config.get(key)
        if not isinstance(stated, Mapping) or stated.get("partial_rotary_factor") is None:
            continue
        sizes, share = latent_sizes(config), stated["partial_rotary_factor"]
        whole = size(config, "head_dim", sizes.plain + sizes.rotated)
        if not isinstance(share, int | float) or not 0 < share <= 1 or int(whole * share) != sizes.rotated:
            msg = (
                f"partial_rotary_factor {str(share)[:60]!r} of {whole} features is not qk_rope_head_dim {sizes.rotated}"
            )
            raise CheckpointError(msg)
        found[key] = {name: value for name, value in stated.items() if name != "partial_rotary_factor"}
    return found


def _from_gguf(stated: Mapping[str, Any], held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the sizes of attention; a head is the whole of it, and not the part with positions.

    Raises:
        CheckpointError: a size is missing.
    """
    found = from_gguf(stated, held)
    return {**found, "head_dim": found["qk_nope_head_dim"] + found["qk_rope_head_dim"]}


MISTRAL4 = replace(
    DEEPSEEK_V3,
    name="mistral4",
    architectures=("Mistral4ForCausalLM",),
    # The converter writes nothing on how queries grow, so that llama.cpp does not let them; it is taken to be what the
    # class has where nothing is stated.
    gguf=replace(GGUF, architecture="mistral4", rope={"llama_4_scaling_beta": _GROWTH}, settings=_from_gguf),
    resolve=_resolve,
    experts=Experts(
        ("n_routed_experts", "num_local_experts"),
        layouts=(PUBLISHED, FUSED),
        normalised="norm_topk_prob",
        scale=Number("routed_scaling_factor", 1.0),
        groups=("n_group", "topk_group"),
    ),
    positions=Positions(
        interleaved=True,
        size_key="qk_rope_head_dim",
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
