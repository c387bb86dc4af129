"""Translate GGUF metadata into a Hugging Face configuration, for the architectures of the family table.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's converter. Values that llama.cpp
implies (Gemma's layer pattern, its second rope base, the query scale of the 27B models) are written out, so that the
result builds the same model in transformers.

Rotary settings take the form of transformers 5.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jcrosslora.checkpoint.families import FAMILIES, Family
from jcrosslora.checkpoint.gguf_metadata import Metadata
from jcrosslora.checkpoint.layout import holder_of
from jcrosslora.checkpoint.llama3_rope import llama3_factors
from jcrosslora.errors import CheckpointError

# Layers of the 27B models, whose queries are scaled by hidden / heads instead of by the head size.
_LAYERS_27B = {"gemma2": 46, "gemma3": 62}


def translate(meta: Metadata, facts: Mapping[str, Any], factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the configuration of a GGUF model with Hugging Face keys.

    Args:
        meta: its metadata.
        facts: values from its tensors: vocab_size, tie_word_embeddings, and "biased", the biases of the first layer.
        factors: its rope factor tensors by GGUF name, if any.

    Raises:
        CheckpointError: rope scaling that is not supported.
    """
    family = _family(meta)
    eps = "attention.layer_norm_rms_epsilon" if family.norm == "rms" else "attention.layer_norm_epsilon"
    config = {
        "model_type": family.name,
        "architectures": [family.architectures[0]],
        "hidden_size": meta.count("embedding_length"),
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": meta.count("block_count"),
        "num_attention_heads": meta.count("attention.head_count"),
        "num_key_value_heads": meta.count("attention.head_count_kv") or meta.count("attention.head_count"),
        family.eps.key: meta.number(eps),
        "max_position_embeddings": meta.count("context_length"),
        "vocab_size": facts["vocab_size"],
        "tie_word_embeddings": facts["tie_word_embeddings"],
        "rope_parameters": rope_parameters(meta, factors),
        family.activation_key: family.activation,
        **_token_ids(meta.values),
    }
    if family.name != "phi3":  # Phi3Config has no such key.
        config["head_dim"] = meta.head_dim()
    for key, roles in family.bias_keys.items():
        config[key] = f"{holder_of(family, roles[0])}.bias" in facts["biased"]
    assert family.gguf is not None
    stated = {key: meta.number(stored) for key, stored in family.gguf.numbers.items()}
    config |= {key: value for key, value in stated.items() if value is not None}
    config |= dict(family.gguf.implied) | _expert_sizes(meta, family)
    return config | _windows(meta, family) | _other_keys(meta, family)


def _family(meta: Metadata) -> Family:
    """Return the family; of several with one architecture, that with windows or experts if the file states them."""
    same = [one for one in FAMILIES.values() if one.gguf is not None and one.gguf.architecture == meta.arch]
    expert = bool(meta.count("expert_count"))
    same = [one for one in same if (one.experts is not None) == expert] or same
    windowed = bool(meta.count("attention.sliding_window"))
    return next((one for one in same if (one.windows is not None) == windowed), same[0])


def _expert_sizes(meta: Metadata, family: Family) -> dict[str, Any]:
    experts = family.experts
    if experts is None:
        return {}
    sizes = {experts.count[0]: "expert_count", experts.used: "expert_used_count"}
    if experts.width != "intermediate_size":
        sizes[experts.width] = "expert_feed_forward_length"
    return {key: meta.count(stored) for key, stored in sizes.items()}


def _token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: values.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def _windows(meta: Metadata, family: Family) -> dict[str, Any]:
    windows, size = family.windows, meta.count("attention.sliding_window") or None
    if windows is None:
        return {}
    if windows.switch is not None:  # The converter writes no window for these.
        return {windows.switch: False}
    if windows.period is None:
        return {"sliding_window": size}
    # Without windows all layers of EXAONE 4 have full attention; other families always have windows.
    period = 1 if size is None and family.positions.unrotated == "full beside windows" else windows.period
    return {"sliding_window": size, "layer_types": _layer_types(meta, period)}


def _other_keys(meta: Metadata, family: Family) -> dict[str, Any]:
    if family.positions.outer_original is not None:
        return {_ORIGINAL: _original(meta)}
    if family.attn_scale is None or family.attn_scale.key != "query_pre_attn_scalar":
        return {}
    if meta.count("block_count") != _LAYERS_27B[meta.arch]:
        return {"query_pre_attn_scalar": meta.head_dim()}
    width, heads = meta.count("embedding_length") or 0, meta.count("attention.head_count") or 1
    return {"query_pre_attn_scalar": width // heads}


def _original(meta: Metadata) -> int | None:
    return meta.count("rope.scaling.original_context_length") or meta.count("context_length")


def _layer_types(meta: Metadata, period: int) -> list[str]:
    # The pattern is a period or one flag per layer; the default is that of llama.cpp and transformers.
    stated = meta.get("attention.sliding_window_pattern")
    layers = meta.count("block_count")
    if layers is None or not 0 < layers < 10_000:
        msg = f"{meta.path}: {meta.arch}.block_count is {layers!r}, wanted the number of layers"
        raise CheckpointError(msg)
    if isinstance(stated, list) and len(stated) == layers:
        return ["sliding_attention" if flag else "full_attention" for flag in stated]
    period = stated if type(stated) is int and stated > 0 else period
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]


_DEFAULT_BASE = 10_000.0  # in llama.cpp and transformers
_ORIGINAL = "original_max_position_embeddings"


def rope_parameters(meta: Metadata, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the `rope_parameters` of a configuration.

    Args:
        meta: the metadata.
        factors: the tensors rope_freqs (llama3), or rope_factors_long and _short (longrope), if the file has them.

    Raises:
        CheckpointError: a scaling type, or factors, that are not supported.
    """
    theta, rules = meta.number("rope.freq_base") or _DEFAULT_BASE, _family(meta).positions
    scaling: dict[str, Any] = {"rope_theta": theta, **_scaling(meta, factors)}
    if rules.local_theta is not None:
        # Without a base of their own in configurations, layers with windows have that of the others in llama.cpp.
        usual = theta if rules.local_theta_key is None else rules.local_theta
        plain = {"rope_theta": meta.number("rope.freq_base_swa") or usual, "rope_type": "default"}
        return {"full_attention": scaling, "sliding_attention": plain}
    if rules.share is not None:
        head_dim = meta.head_dim()
        scaling["partial_rotary_factor"] = (meta.count("rope.dimension_count") or head_dim) / max(head_dim, 1)
    if rules.grows:
        scaling |= _growing(meta)
    return scaling


def _growing(meta: Metadata) -> dict[str, Any]:
    """Return what the yarn of Ministral 3 has beside factor and length; files state one of its two mscales."""
    stated = {
        "llama_4_scaling_beta": meta.number("attention.temperature_scale"),
        "beta_fast": meta.number("rope.scaling.yarn_beta_fast"),
        "beta_slow": meta.number("rope.scaling.yarn_beta_slow"),
        "mscale": meta.number("rope.scaling.yarn_log_multiplier"),
    }
    if stated["llama_4_scaling_beta"] is None or stated["mscale"] not in (None, 1.0):
        msg = f"{meta.path}: {meta.arch}.attention.temperature_scale is missing, or rope.scaling.yarn_log_multiplier "
        raise CheckpointError(msg + f"is {stated['mscale']}, wanted 1: use the safetensors of the model")
    known = {key: value for key, value in stated.items() if value is not None}
    return known | ({"mscale_all_dim": 1.0} if "mscale" in known else {})


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
        return {"rope_type": "yarn", "factor": factor, _ORIGINAL: _original(meta)}
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
        _ORIGINAL: 8192,
    }
    theta = meta.number("rope.freq_base") or _DEFAULT_BASE
    if not np.allclose(llama3_factors(stored.size, theta, **settings), stored, rtol=1e-4):
        msg = f"{meta.path}: rope_freqs.weight does not follow the llama3 rule with its published constants"
        raise CheckpointError(msg)
    return {"rope_type": "llama3", **settings}
