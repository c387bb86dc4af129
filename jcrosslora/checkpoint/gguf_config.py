"""Translate GGUF metadata into a Hugging Face configuration, for the architectures of the family table.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter. Values that llama.cpp
implies (Gemma's layer pattern, its second rope base, the query scale of the 27B models) are written out, so that the
result builds the same model in transformers.

Rotary settings take the form of transformers 5.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jcrosslora.checkpoint.families import FAMILIES
from jcrosslora.checkpoint.gguf_metadata import ARCHITECTURES, Metadata
from jcrosslora.checkpoint.llama3_rope import llama3_factors
from jcrosslora.errors import CheckpointError

# Layers of the 27B models, whose queries are scaled by hidden / heads instead of by the head size.
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN = 6  # five sliding layers, then a full layer


def translate(meta: Metadata, facts: Mapping[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the configuration of a GGUF model with Hugging Face keys.

    Args:
        meta: its metadata.
        facts: values from its tensors: vocab_size, tie_word_embeddings, attention_bias, mlp_bias.
        factors: its rope factor tensors by GGUF name, if any.

    Raises:
        CheckpointError: rope scaling that is not supported.
    """
    model_type = ARCHITECTURES[meta.arch]
    if meta.arch == "llama" and meta.count("attention.sliding_window"):
        model_type = "mistral"
    config = {
        "model_type": model_type,
        "architectures": [FAMILIES[model_type].architectures[0]],
        "hidden_size": meta.count("embedding_length"),
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": meta.count("block_count"),
        "num_attention_heads": meta.count("attention.head_count"),
        "num_key_value_heads": meta.count("attention.head_count_kv") or meta.count("attention.head_count"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.count("context_length"),
        "vocab_size": facts["vocab_size"],
        "tie_word_embeddings": facts["tie_word_embeddings"],
        "rope_parameters": rope_parameters(meta, factors),
        **_token_ids(meta.values),
    }
    if model_type != "phi3":  # Phi3Config has no such key.
        config["head_dim"] = meta.head_dim()
    return config | _family_part(meta, model_type, facts)


def _token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: values.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def _family_part(meta: Metadata, model_type: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    window = meta.count("attention.sliding_window") or None
    bias = {"attention_bias": facts["attention_bias"]}
    if model_type.startswith("gemma"):
        return _gemma_part(meta, window) | bias
    if model_type == "phi3":
        original = meta.count("rope.scaling.original_context_length") or meta.count("context_length")
        return {"hidden_act": "silu", "sliding_window": window, "original_max_position_embeddings": original}
    parts = {
        "llama": {**bias, "mlp_bias": facts["mlp_bias"]},
        "mistral": {"sliding_window": window},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, **bias},
    }
    return {"hidden_act": "silu", **parts[model_type]}


def _gemma_part(meta: Metadata, window: int | None) -> dict[str, Any]:
    part: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": window}
    part["query_pre_attn_scalar"] = meta.head_dim()
    if meta.count("block_count") == _LAYERS_27B[meta.arch]:
        part["query_pre_attn_scalar"] = (meta.count("embedding_length") or 0) // (
            meta.count("attention.head_count") or 1
        )
    part["layer_types"] = _layer_types(meta)
    if meta.arch == "gemma2":
        part["attn_logit_softcapping"] = meta.number("attn_logit_softcapping") or 50.0
        part["final_logit_softcapping"] = meta.number("final_logit_softcapping") or 30.0
    return part


def _layer_types(meta: Metadata) -> list[str]:
    # The pattern is a period or one flag per layer; the default is that of llama.cpp and transformers.
    stated = meta.get("attention.sliding_window_pattern")
    layers = meta.count("block_count")
    if layers is None or not 0 < layers < 10_000:
        msg = f"{meta.path}: {meta.arch}.block_count is {layers!r}, wanted the number of layers"
        raise CheckpointError(msg)
    if isinstance(stated, list) and len(stated) == layers:
        return ["sliding_attention" if flag else "full_attention" for flag in stated]
    period = stated if type(stated) is int and stated > 0 else (2 if meta.arch == "gemma2" else _GEMMA3_PATTERN)
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]


_DEFAULT_BASE = 10_000.0  # in llama.cpp and transformers
_GEMMA3_LOCAL_BASE = 10_000.0


def rope_parameters(meta: Metadata, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the `rope_parameters` of a configuration.

    Args:
        meta: the metadata.
        factors: the tensors rope_freqs (llama3), or rope_factors_long and _short (longrope), if the file has them.

    Raises:
        CheckpointError: a scaling type, or factors, that are not supported.
    """
    theta = meta.number("rope.freq_base") or _DEFAULT_BASE
    scaling: dict[str, Any] = {"rope_theta": theta, **_scaling(meta, factors)}
    if meta.arch == "gemma3":
        local = meta.number("rope.freq_base_swa") or _GEMMA3_LOCAL_BASE
        plain = {"rope_theta": local, "rope_type": "default"}
        return {"full_attention": scaling, "sliding_attention": plain}
    if meta.arch == "phi3":
        head_dim = meta.head_dim()
        scaling["partial_rotary_factor"] = (meta.count("rope.dimension_count") or head_dim) / max(head_dim, 1)
    return scaling


def _scaling(meta: Metadata, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    if "rope_freqs.weight" in factors:
        return _llama3_scaling(factors["rope_freqs.weight"], meta)
    if "rope_factors_long.weight" in factors and "rope_factors_short.weight" in factors:
        return {
            "rope_type": "longrope",
            "long_factor": _decimals(factors["rope_factors_long.weight"]),
            "short_factor": _decimals(factors["rope_factors_short.weight"]),
        }
    kind, factor = meta.get("rope.scaling.type", "none"), meta.number("rope.scaling.factor")
    if kind == "none" or (factor is None and meta.arch == "phi3"):
        return {"rope_type": "default"}
    if kind == "linear" and factor is not None:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor is not None:
        original = meta.count("rope.scaling.original_context_length") or meta.count("context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    msg = f"{meta.path}: rope scaling {kind!r} with factor {factor} is not supported"
    raise CheckpointError(msg)


def _decimals(values: np.ndarray) -> list[float]:
    return [float(str(value)) for value in values.astype(np.float32)]


def _llama3_scaling(stored: np.ndarray, meta: Metadata) -> dict[str, Any]:
    # The file keeps only the resulting factors. Every published Llama 3 uses the same three constants beside the
    # factor; the formula with them must give the stored numbers, otherwise the settings are unknown.
    settings: dict[str, Any] = {
        "factor": round(float(stored.max(initial=1.0)), 4),  # free of float32 rounding; checked below
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theta = meta.number("rope.freq_base") or _DEFAULT_BASE
    if not np.allclose(llama3_factors(stored.size, theta, **settings), stored, rtol=1e-4):
        msg = f"{meta.path}: rope_freqs.weight does not follow the llama3 rule with its published constants"
        raise CheckpointError(msg)
    return {"rope_type": "llama3", **settings}
