"""Rotary settings of a GGUF file, in the form of transformers 5."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jcrosslora.checkpoint.gguf_metadata import Metadata
from jcrosslora.checkpoint.llama3_rope import llama3_factors
from jcrosslora.errors import CheckpointError

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
