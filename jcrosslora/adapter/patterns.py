"""Ranks and scales that differ between modules, by PEFT's rule (`rank_pattern`, `alpha_pattern`)."""

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

# Enough for a large model with a rank for each module: re itself caches 512 patterns and recompiles the others.
_KEPT = 1 << 14


def matching_key(keys: Iterable[str], module: str) -> str | None:
    """Find the first key, in order, that PEFT applies to `module`; None if there is none.

    A key is a regular expression for the whole name or for its end from a dot on, so `layers.1.mlp` does not match
    in `layers.11.mlp`. A key that starts with `^` matches the whole name only.

    Source: peft.utils.other.get_pattern_key (peft 0.21).

    Raises:
        re.error: a key is not a regular expression.
    """
    for key in keys:
        if _compiled(key).match(module):
            return key
    return None


@lru_cache(maxsize=_KEPT)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """Return the rank that the configuration gives to a module (name without the PEFT prefix)."""
    return _pattern_value(config, "rank_pattern", "r", module)


def module_alpha(config: Mapping[str, Any], module: str, default: str = "lora_alpha") -> float:
    """Return the alpha that the configuration gives to a module (name without the PEFT prefix)."""
    return _pattern_value(config, "alpha_pattern", default, module)


def module_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732)."""
    return module_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def exact_pattern(module: str) -> str:
    """Return a key that matches this module and no other."""
    return "^" + re.escape(module)


def _pattern_value(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    table = config.get(patterns) or {}
    key = matching_key(table, module)
    return config[default] if key is None else table[key]
