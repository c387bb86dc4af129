"""Read the rotary position settings of a configuration and resolve them to frequencies.

Reads both spellings: `rope_theta`, `rope_scaling` and `rope_local_base_freq` of transformers 4, and `rope_parameters`
(flat, or one entry per kind of layer) of transformers 5. Each type follows `modeling_rope_utils.py` of transformers;
`yarn` is arXiv 2309.00071, `longrope` is arXiv 2402.13753.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jcrosslora.checkpoint import Dims, Family
from jcrosslora.decoder.layer_kinds import FULL, SLIDING
from jcrosslora.decoder.rope_scaling import (
    Growth,
    Rope,
    default,
    linear,
    llama3,
    longrope,
    ntk,
    proportional,
    scaled_longrope,
    yarn,
)
from jcrosslora.errors import CheckpointError

_COMMON = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_ORIGINAL, _LONGEST = "original_max_position_embeddings", "max_position_embeddings"
_GROWTH = "llama_4_scaling_beta"
_SHARED = "proportional"  # the share of the features that are rotated is a matter of the frequencies
_YARN = {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGINAL}
# rope type -> function, and the allowed keys beside the common ones.
_RULES: Mapping[str, tuple[Callable[..., Rope], set[str]]] = {
    "default": (default, set()),
    "linear": (linear, {"factor"}),
    "llama3": (llama3, {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
    "yarn": (yarn, _YARN),
    "longrope": (longrope, {"factor", "attention_factor", "short_factor", "long_factor", _ORIGINAL}),
}
# Types that some families have beside these (`Positions.types`). Hunyuan's "dynamic" is static, by its alpha, and reads
# no other of its numbers. Phi's with experts states the amplitude.
_MORE_RULES = {
    "dynamic": (ntk, {"alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}),
    _SHARED: (proportional, {"factor"}),
    "longrope": (scaled_longrope, {"short_factor", "long_factor", "short_mscale", "long_mscale", _ORIGINAL}),
}


def read_ropes(config: Mapping[str, Any], family: Family, dims: Dims, ref: str) -> dict[str, Rope]:
    """Read the rotary settings of each kind of layer, "full_attention" and "sliding_attention".

    Args:
        config: checked configuration with Hugging Face keys.
        family: its family.
        dims: sizes of the model.
        ref: name of the model in errors.

    Raises:
        CheckpointError: a rope type, key or number is not supported.
    """
    read = _kinds if family.positions.local_theta is None else _separate_kinds
    of_kind = {FULL: dims, SLIDING: dims}
    if family.global_heads is not None:
        of_kind[FULL] = dataclasses.replace(dims, head_dim=family.global_heads(config).size)
    found = read(config, family, ref)
    return {kind: _rope(settings, config, family, of_kind[kind], ref) for kind, settings in found.items()}


def unrotated(rope: Rope, growth: Growth | None = None) -> Rope:
    """Return the setting of a layer without positions, with as many pairs as another: its angles are zero."""
    return Rope((0.0,) * len(rope.frequencies), growth=growth)


def unrotated_growth(config: Mapping[str, Any], family: Family, ref: str) -> Growth | None:
    """Read how the queries of layers without positions grow; None if they do not.

    Raises:
        CheckpointError: a number is missing or out of range.
    """
    if not family.positions.unrotated_grow or not config.get("attn_temperature_tuning"):
        return None
    return _growth(config, ("attn_scale", "floor_scale"), ref)._replace(first=1)


def _kinds(config: Mapping[str, Any], family: Family, ref: str) -> dict[str, dict[str, Any]]:
    given = config.get("rope_scaling") or config.get("rope_parameters") or family.positions.settings
    stated = _dict(given, ref)
    theta = config.get("rope_theta") or family.positions.theta
    if family.positions.unrotated == "no theta":  # the number of pairs alone is read then
        stated = {key: value for key, value in stated.items() if key != "rope_theta" or value is not None}
    nested = [kind for kind in (FULL, SLIDING) if kind in stated]
    if nested and len(nested) < len(stated):
        msg = f"{ref}: rope_parameters mixes kinds of layers and settings: {sorted(stated)}; wanted only one of them"
        raise CheckpointError(msg)
    if nested:
        return {kind: {"rope_theta": theta, **_dict(stated[kind], ref)} for kind in nested}
    return {kind: {"rope_theta": theta, **stated} for kind in (FULL, SLIDING)}


def _separate_kinds(config: Mapping[str, Any], family: Family, ref: str) -> dict[str, dict[str, Any]]:
    rules, stated = family.positions, _dict(config.get("rope_parameters") or {}, ref)
    if set(stated) - {FULL, SLIDING}:
        msg = f"{ref}: rope_parameters has {sorted(stated)}, wanted {FULL} and {SLIDING}"
        raise CheckpointError(msg)
    kinds = {kind: dict(_dict(stated.get(kind) or {}, ref)) for kind in (FULL, SLIDING)}
    kinds[FULL].update(_dict(config.get("rope_scaling") or {}, ref))
    kinds[FULL].setdefault("rope_theta", config.get("rope_theta") or rules.theta)
    local = None if rules.local_theta_key is None else config.get(rules.local_theta_key)
    kinds[SLIDING].setdefault("rope_theta", local or rules.local_theta)
    return kinds


def _dict(value: Any, ref: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        msg = f"{ref}: rope settings {value!r} are not a JSON object"
        raise CheckpointError(msg)
    return value


def _rope(settings: Mapping[str, Any], config: Mapping[str, Any], family: Family, dims: Dims, ref: str) -> Rope:
    settings = {key: value for key, value in settings.items() if value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    rules = {**_RULES, **{name: _MORE_RULES[name] for name in family.positions.types}}
    if isinstance(kind, str):
        kind = family.positions.aliases.get(kind, kind)
    if not isinstance(kind, str) or kind not in rules:
        msg = f"{ref}: rope type {kind!r} is not supported; supported: {', '.join(rules)}"
        raise CheckpointError(msg)
    rule, keys = rules[kind]
    known = keys | _COMMON | ({_GROWTH, _ORIGINAL, _LONGEST} if family.positions.grows else set())
    unknown = sorted(set(settings) - known)
    if unknown:
        msg = f"{ref}: rope setting {unknown[0]!r}={settings[unknown[0]]!r} is not supported for rope type {kind!r}"
        raise CheckpointError(msg)
    settings |= _lengths(settings, config, family)
    size = dims.head_dim if kind == _SHARED else _rotated(settings, config, family, dims, ref)
    rope = _resolve(rule, settings, size, f"{ref}: rope type {kind!r}")
    if not family.positions.grows:
        return rope
    return dataclasses.replace(rope, growth=_growth(settings, (_GROWTH, _ORIGINAL), ref))


def _lengths(settings: Mapping[str, Any], config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    # Phi-3 states the original length outside the rope settings, and uses that one.
    longest, outer = config.get(_LONGEST), family.positions.outer_original
    original = settings.get(_ORIGINAL, longest) if outer is None else config.get(_ORIGINAL, outer)
    return {_LONGEST: longest, _ORIGINAL: original}


def _growth(settings: Mapping[str, Any], keys: tuple[str, str], ref: str) -> Growth:
    beta, length = (settings.get(key) for key in keys)
    if (
        isinstance(beta, int | float)
        and not isinstance(beta, bool)
        and isinstance(length, int)
        and 0 <= beta < 1e3
        and 0 < length < 1 << 31
    ):
        return Growth(float(beta), length)
    msg = f"{ref}: {keys[0]} {beta!r} and {keys[1]} {length!r} are missing or no positive numbers"
    raise CheckpointError(msg)


def _rotated(settings: Mapping[str, Any], config: Mapping[str, Any], family: Family, dims: Dims, ref: str) -> int:
    usual = family.positions.share
    share = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or usual or 1.0
    if usual is None and share != 1.0:
        msg = f"{ref}: partial_rotary_factor {share!r} is not supported for {family.name}"
        raise CheckpointError(msg)
    whole = dims.head_dim if family.positions.size_key is None else config.get(family.positions.size_key)
    if type(whole) is not int:
        msg = f"{ref}: {family.positions.size_key} is {whole!r}, wanted a positive integer"
        raise CheckpointError(msg)
    size = int(whole * share) if isinstance(share, int | float) and 0 < share <= 1 else 0
    if size < 2 or size % 2:
        msg = f"{ref}: partial_rotary_factor {share!r} of {whole} features gives no positive even size"
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
    factors = [*rope.frequencies, *(rope.long_frequencies or ()), rope.amplitude, rope.latent_scale]
    with np.errstate(over="ignore"):
        finite = np.all(np.isfinite(np.asarray(factors, np.float32)))
    if not finite:
        msg = f"{ref}: the settings give frequencies or an amplitude that are not finite"
        raise CheckpointError(msg)
    return rope
