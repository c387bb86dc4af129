"""Llama 4 (text): attention in chunks, layers without positions, and experts that read their input times their score.

Queries of layers without positions grow with the position. Beside the experts is one that all tokens share. Layers
between may have an MLP of another width instead of them.
"""

from collections.abc import Mapping
from typing import Any

from jcrosslora.architectures.blocks import ATTENTION, MLP, SHARED
from jcrosslora.architectures.config import Number, listed_rotated, refuse, size, words
from jcrosslora.architectures.expert_rules import ExpertRules
from jcrosslora.architectures.family import Family, Gguf, Positions, Windows
from jcrosslora.errors import CheckpointError

_EXPERTS = "feed_forward.experts."
_ROUTER = {"router": "feed_forward.router.weight"}
_STORED = _ROUTER | {"gate_up": f"{_EXPERTS}gate_up_proj", "down": f"{_EXPERTS}down_proj"}
# As in GGUF.
_MERGED = _ROUTER | {part: f"{_EXPERTS}{part}_proj.weight" for part in ("gate", "up", "down")}

# What llama.cpp implies, and files do not state: the settings of the published models.
_CHUNK, _PERIOD = 8192, 4
_IMPLIED = {
    "attention_chunk_size": _CHUNK,
    "no_rope_layer_interval": _PERIOD,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": 8192,
}
_WITHOUT_NORMS = 128  # experts of the models, such as Maverick, whose queries and keys it does not normalise


def _sparse(config: Mapping[str, Any], layers: int) -> list[bool]:
    listed = config.get("moe_layers")
    if listed is None:
        step = size(config, "interleave_moe_layer_step", 1)
        listed = range(step - 1, layers, step)
    elif not isinstance(listed, list | tuple) or not all(type(layer) is int for layer in listed):
        refuse("moe_layers", listed, "a list of layers")
    return [layer in listed for layer in range(layers)]


def _from_gguf(stated: Mapping[str, Any], _held: Mapping[str, frozenset[int]]) -> dict[str, Any]:
    """Return the widths, and whether queries and keys are normalised, by the number of experts as in llama.cpp."""
    theta = stated.get("rope.freq_base")
    wanted = {
        "attention.sliding_window": _CHUNK,
        "attention.sliding_window_pattern": _PERIOD,
        "rope.freq_base_swa": theta,
    }
    for key, value in wanted.items():
        if stated.get(key, value) != value:
            msg = f"llama4.{key} is {str(stated[key])[:60]}, wanted {value} or nothing: use the safetensors"
            raise CheckpointError(msg)
    return {
        "intermediate_size": stated.get("expert_feed_forward_length"),
        "intermediate_size_mlp": stated.get("feed_forward_length"),
        "use_qk_norm": stated.get("expert_count") != _WITHOUT_NORMS,
    }


LLAMA4 = Family(
    name="llama4_text",
    architectures=("Llama4ForCausalLM",),
    gguf=Gguf(
        "llama4",
        counts={"interleave_moe_layer_step": "interleave_moe_layer_step"},
        implied=_IMPLIED,
        settings=_from_gguf,
    ),
    fused={f"feed_forward.{role}": (role,) for role in MLP}
    | {f"feed_forward.shared_expert.{role.removeprefix('shared_')}": (role,) for role in SHARED},
    width_key="intermediate_size_mlp",
    experts=ExpertRules(
        ("num_local_experts",),
        width="intermediate_size",
        layouts=(_STORED, _MERGED, _STORED),
        scores="chosen sigmoid",
        normalised=False,
        scaled_inputs=True,
        transposed=frozenset({_STORED["gate_up"], _STORED["down"]}),
        turned=True,
        layers=_sparse,
        shared=lambda config: size(config, "intermediate_size"),
    ),
    qk_norms="unit",
    qk_norm_key="use_qk_norm",
    bias_keys={"attention_bias": ATTENTION},
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=8192, size_key="attention_chunk_size", chunked=True, which="rotated"),
    positions=Positions(
        theta=500_000.0,
        interleaved=True,
        rotated=lambda config, kinds: listed_rotated(config, len(kinds)),
        unrotated_grow=True,
    ),
    keys=words(
        "attn_scale attn_temperature_tuning floor_scale for_llm_compressor interleave_moe_layer_step moe_layers "
        "no_rope_layer_interval no_rope_layers router_jitter_noise"
    ),
    # Defaults of Llama4TextConfig: the `text_config` of a multimodal checkpoint may omit these keys.
    defaults={
        "vocab_size": 202_048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
    },
)
