"""Read the rotary position settings of a configuration and resolve them to frequencies.

Reads both spellings: `rope_theta`, `rope_scaling` and `rope_local_base_freq` of transformers 4, and `rope_parameters`
(flat, or one entry per kind of layer) of transformers 5. Each type follows `modeling_rope_utils.py` of transformers;
`yarn` is arXiv 2309.00071, `longrope` is arXiv 2402.13753.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jcrosslora.checkpoint import Dims
from jcrosslora.decoder.rope_scaling import Rope, default, linear, llama3, longrope, yarn
from jcrosslora.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"
_THETA = 10_000.0  # default base of the frequencies
_GEMMA3_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_COMMON = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_ORIGINAL = "original_max_position_embeddings"
_YARN = {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGINAL}
# rope type -> function, and the allowed keys beside the common ones.
_RULES: Mapping[str, tuple[Callable[..., Rope], set[str]]] = {
    "default": (default, set()),
    "linear": (linear, {"factor"}),
    "llama3": (llama3, {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
    "yarn": (yarn, _YARN),
    "longrope": (longrope, {"factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL}),
}


def read_ropes(config: Mapping[str, Any], family: str, dims: Dims, ref: str) -> dict[str, Rope]:
    """Read the rotary settings of each kind of layer, "full_attention" and "sliding_attention".

    Args:
        config: checked configuration with Hugging Face keys.
        family: name of the family.
        dims: sizes of the model.
        ref: name of the model in errors.

    Raises:
        CheckpointError: a rope type, key or number is not supported.
    """
    per_kind = _gemma3_kinds(config, ref) if family == "gemma3_text" else _kinds(config, ref)
    return {kind: _rope(settings, config, family, dims, ref) for kind, settings in per_kind.items()}


def _kinds(config: Mapping[str, Any], ref: str) -> dict[str, dict[str, Any]]:
    stated = _dict(config.get("rope_scaling") or config.get("rope_parameters") or {}, ref)
    theta = config.get("rope_theta") or _THETA
    nested = [kind for kind in (FULL, SLIDING) if kind in stated]
    if nested and len(nested) < len(stated):
        msg = f"{ref}: rope_parameters mixes kinds of layers and settings: {sorted(stated)}; wanted only one of them"
        raise CheckpointError(msg)
    if nested:
        return {kind: {"rope_theta": theta, **_dict(stated[kind], ref)} for kind in nested}
    return {kind: {"rope_theta": theta, **stated} for kind in (FULL, SLIDING)}


def _gemma3_kinds(config: Mapping[str, Any], ref: str) -> dict[str, dict[str, Any]]:
    stated = _dict(config.get("rope_parameters") or {}, ref)
    if set(stated) - {FULL, SLIDING}:
        msg = f"{ref}: rope_parameters has {sorted(stated)}, wanted {FULL} and {SLIDING}"
        raise CheckpointError(msg)
    kinds = {kind: dict(_dict(stated.get(kind) or {}, ref)) for kind in (FULL, SLIDING)}
    kinds[FULL].update(_dict(config.get("rope_scaling") or {}, ref))
    kinds[FULL].setdefault("rope_theta", config.get("rope_theta") or _GEMMA3_THETA[FULL])
    kinds[SLIDING].setdefault("rope_theta", config.get("rope_local_base_freq") or _GEMMA3_THETA[SLIDING])
    return kinds


def _dict(value: Any, ref: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        msg = f"{ref}: rope settings {value!r} are not a JSON object"
        raise CheckpointError(msg)
    return value


def _rope(settings: Mapping[str, Any], config: Mapping[str, Any], family: str, dims: Dims, ref: str) -> Rope:
    settings = {key: value for key, value in settings.items() if value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):  # the names of longrope in the first releases of Phi-3
        kind = "longrope"
    if not isinstance(kind, str) or kind not in _RULES:
        msg = f"{ref}: rope type {kind!r} is not supported; supported: {', '.join(_RULES)}"
        raise CheckpointError(msg)
    rule, keys = _RULES[kind]
    unknown = sorted(set(settings) - keys - _COMMON)
    if unknown:
        msg = f"{ref}: rope setting {unknown[0]!r}={settings[unknown[0]]!r} is not supported for rope type {kind!r}"
        raise CheckpointError(msg)
    if _ORIGINAL in keys:
        settings |= _lengths(settings, config, family)
    return _resolve(rule, settings, _rotated(settings, config, family, dims, ref), f"{ref}: rope type {kind!r}")


def _lengths(settings: Mapping[str, Any], config: Mapping[str, Any], family: str) -> dict[str, Any]:
    # Phi-3 states the original length outside the rope settings, and uses that one.
    longest = config.get("max_position_embeddings")
    original = settings.get("original_max_position_embeddings", longest)
    if family == "phi3":
        original = config.get("original_max_position_embeddings", 4096)
    return {"max_position_embeddings": longest, "original_max_position_embeddings": original}


def _rotated(settings: Mapping[str, Any], config: Mapping[str, Any], family: str, dims: Dims, ref: str) -> int:
    share = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if family != "phi3" and share != 1.0:
        msg = f"{ref}: partial_rotary_factor {share!r} is not supported for {family}"
        raise CheckpointError(msg)
    size = int(dims.head_dim * share) if isinstance(share, int | float) and 0 < share <= 1 else 0
    if size < 2 or size % 2:
        msg = f"{ref}: partial_rotary_factor {share!r} of head_dim {dims.head_dim} gives no positive even size"
        raise CheckpointError(msg)
    return size


def _resolve(rule: Callable[..., Rope], settings: Mapping[str, Any], size: int, ref: str) -> Rope:
    # Wrong types and numbers in the configuration raise various errors here.
    try:
        with np.errstate(all="ignore"):
            rope = rule(size, **{key: value for key, value in settings.items() if key not in ("rope_type", "type")})
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        msg = f"{ref}: {error}"
        raise CheckpointError(msg) from error
    if not np.all(np.isfinite([*rope.frequencies, *(rope.long_frequencies or ())])):
        msg = f"{ref}: the settings give frequencies that are not finite"
        raise CheckpointError(msg)
    return rope
