"""Read the rotary position settings of a configuration and resolve them to frequencies.

Reads both spellings: `rope_theta`, `rope_scaling` and `rope_local_base_freq` of transformers 4, and `rope_parameters`
(flat, or one entry per kind of layer) of transformers 5. Each type follows `modeling_rope_utils.py` of transformers;
`yarn` is arXiv 2309.00071, `longrope` is arXiv 2402.13753.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jcrosslora.architectures import ropes
from jcrosslora.architectures.architecture import Architecture
from jcrosslora.architectures.config import FULL, SLIDING
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.ropes import LONGEST, ORIGINAL, Growth, Rope
from jcrosslora.errors import CheckpointError

_COMMON = frozenset({"rope_theta", "rope_type", "type", "partial_rotary_factor"})
_GROWTH = "llama_4_scaling_beta"
_SHARED = "proportional"  # its frequencies, not the size, decide the share of rotated features
_YARN = {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", ORIGINAL}
# rope type -> function, and the allowed keys in addition to the common ones.
_RULES: Mapping[str, tuple[Callable[..., Rope], set[str]]] = {
    "default": (ropes.default, set()),
    "linear": (ropes.linear, {"factor"}),
    "llama3": (ropes.llama3, {"factor", "low_freq_factor", "high_freq_factor", ORIGINAL}),
    "yarn": (ropes.yarn, _YARN),
    "longrope": (ropes.longrope, {"factor", "attention_factor", "short_factor", "long_factor", ORIGINAL}),
}
# Further types of some families (`Positions.types`). Hunyuan's "dynamic" is static and reads only alpha. Phi with
# experts states the amplitude of longrope.
_MORE_RULES = {
    "dynamic": (ropes.ntk, {"alpha", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}),
    _SHARED: (ropes.proportional, {"factor"}),
    "longrope": (ropes.scaled_longrope, {"short_factor", "long_factor", "short_mscale", "long_mscale", ORIGINAL}),
}


def layer_ropes(model: Architecture, kinds: Sequence[str]) -> list[Rope]:
    """Return the rotary setting of each layer by its kind; layers without positions get angles of zero.

    Raises CheckpointError if a rope type, key or number is not supported, or a kind of layer has no settings.
    """
    config, family = model.config, model.family
    rule = family.positions.rotated
    rotated = [True] * len(kinds) if rule is None else rule(config, kinds)
    of_kind = _read_ropes(model, kinds, any(rotated))
    missing = sorted(set(kinds) - set(of_kind))
    if missing:
        msg = f"rope_parameters has no entry for {missing[0]} layers; expected one for each kind of layer"
        raise CheckpointError(msg)
    growth = None
    if family.positions.scales_unrotated and config.get("attn_temperature_tuning"):
        growth = _growth(config, ("attn_scale", "floor_scale"))._replace(first=1)
    return [
        of_kind[kind] if turns else Rope((0.0,) * len(of_kind[kind].frequencies), growth=growth)
        for kind, turns in zip(kinds, rotated, strict=True)
    ]


def _read_ropes(model: Architecture, kinds: Sequence[str], turns: bool) -> dict[str, Rope]:
    """Read the rotary settings of each kind of layer; unless any layer `turns`, only the number of pairs counts."""
    config, family = model.config, model.family
    found = _kinds(config, family) if family.positions.local_theta is None else _separate_kinds(config, family)
    if not turns:
        theta = family.positions.theta
        found = {
            kind: {key: theta if key == "rope_theta" and value is None else value for key, value in one.items()}
            for kind, one in found.items()
        }
    sizes = {FULL: model.dims.head_dim, SLIDING: model.dims.head_dim}
    for kind, layer in zip(kinds, model.stack, strict=True):
        sizes[kind] = layer.rotated_size or sizes[kind]
    return {kind: _rope(settings, config, family, sizes[kind]) for kind, settings in found.items()}


def _kinds(config: Mapping[str, Any], family: Family) -> dict[str, dict[str, Any]]:
    given = config.get("rope_scaling") or config.get("rope_parameters") or family.positions.settings
    stated = _dict(given)
    theta = config.get("rope_theta") or family.positions.theta
    nested = [kind for kind in (FULL, SLIDING) if kind in stated]
    if nested and len(nested) < len(stated):
        msg = f"rope_parameters mixes kinds of layers and settings: {sorted(stated)}; expected only one of them"
        raise CheckpointError(msg)
    if nested:
        return {kind: {"rope_theta": theta, **_dict(stated[kind])} for kind in nested}
    return {kind: {"rope_theta": theta, **stated} for kind in (FULL, SLIDING)}


def _separate_kinds(config: Mapping[str, Any], family: Family) -> dict[str, dict[str, Any]]:
    rules, stated = family.positions, _dict(config.get("rope_parameters") or {})
    if set(stated) - {FULL, SLIDING}:
        raise CheckpointError(f"rope_parameters has {sorted(stated)}, expected {FULL} and {SLIDING}")
    kinds = {kind: dict(_dict(stated.get(kind) or {})) for kind in (FULL, SLIDING)}
    kinds[FULL].update(_dict(config.get("rope_scaling") or {}))
    kinds[FULL].setdefault("rope_theta", config.get("rope_theta") or rules.theta)
    local = None if rules.local_theta_key is None else config.get(rules.local_theta_key)
    kinds[SLIDING].setdefault("rope_theta", local or rules.local_theta)
    return kinds


def _dict(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"rope settings {value!r} are not a JSON object")
    return value


def _rope(settings: Mapping[str, Any], config: Mapping[str, Any], family: Family, whole: int) -> Rope:
    settings = {key: value for key, value in settings.items() if value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    rules = {**_RULES, **{name: _MORE_RULES[name] for name in family.positions.types}}
    if isinstance(kind, str):
        kind = family.positions.aliases.get(kind, kind)
    if not isinstance(kind, str) or kind not in rules:
        raise CheckpointError(f"rope type {kind!r} is not supported; supported: {', '.join(rules)}")
    rule, keys = rules[kind]
    known = keys | _COMMON | ({_GROWTH, ORIGINAL, LONGEST} if family.positions.grows else set())
    unknown = sorted(set(settings) - known)
    if unknown:
        msg = f"rope setting {unknown[0]!r}={settings[unknown[0]]!r} is not supported for rope type {kind!r}"
        raise CheckpointError(msg)
    # Phi-3 states and reads the original length outside the rope settings.
    longest, outer = config.get(LONGEST), family.positions.outer_original
    original = settings.get(ORIGINAL, longest) if outer is None else config.get(ORIGINAL, outer)
    settings |= {LONGEST: longest, ORIGINAL: original}
    size = whole if kind == _SHARED else _rotated(settings, config, family, whole)
    rope = _resolve(rule, settings, size, kind)
    if not family.positions.grows:
        return rope
    return dataclasses.replace(rope, growth=_growth(settings, (_GROWTH, ORIGINAL)))


def _growth(settings: Mapping[str, Any], keys: tuple[str, str]) -> Growth:
    stated: list[Any] = [settings.get(key) for key in keys]
    beta, length = stated
    numbers = isinstance(beta, int | float) and not isinstance(beta, bool) and isinstance(length, int)
    if numbers and 0 <= beta < 1e3 and 0 < length < 1 << 31:
        return Growth(float(beta), length)
    raise CheckpointError(f"{keys[0]} {beta!r} and {keys[1]} {length!r} are missing or no positive numbers")


def _rotated(settings: Mapping[str, Any], config: Mapping[str, Any], family: Family, whole: int) -> int:
    usual = family.positions.share
    share = settings.get("partial_rotary_factor") or config.get("partial_rotary_factor") or usual or 1.0
    if usual is None and share != 1.0:
        raise CheckpointError(f"partial_rotary_factor {share!r} is not supported for {family.name}")
    size = int(whole * share) if isinstance(share, int | float) and 0 < share <= 1 else 0
    if size < 2 or size % 2:
        raise CheckpointError(f"partial_rotary_factor {share!r} of {whole} features gives no positive even size")
    return size


def _resolve(rule: Callable[..., Rope], settings: Mapping[str, Any], size: int, kind: str) -> Rope:
    # Wrong types and numbers in the configuration raise various errors here.
    try:
        with np.errstate(all="ignore"):
            rope = rule(size, settings)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError, KeyError) as error:
        msg = f"rope type {kind!r}: {error}{' is missing' if isinstance(error, KeyError) else ''}"
        raise CheckpointError(msg) from error
    factors = [*rope.frequencies, *(rope.long_frequencies or ()), rope.amplitude, rope.latent_scale]
    with np.errstate(over="ignore"):
        finite = np.all(np.isfinite(np.asarray(factors, np.float32)))
    if not finite:
        raise CheckpointError(f"rope type {kind!r}: the settings give frequencies or an amplitude that are not finite")
    return rope
