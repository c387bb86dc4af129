"""Ranks and scales that differ between modules, by PEFT's rule (`rank_pattern`, `alpha_pattern`).

The time that matching a pattern can take is bounded: Python's regular expressions try every way to match,
exponentially many for `(a+)+`: a malicious configuration could block its reader.

Some linear modules are adapted by peft only if their weight is named (`target_parameters`) and not the module.
transformers 5 holds all experts of a layer in one parameter. In the classes of `_TAKEN` peft takes every target called
gate_proj, up_proj or down_proj, by its whole name too, for that parameter, and the factors of dense layers and of
shared experts are lost. The names and shapes of the factors are the same in both forms, so other engines read either.

Source: peft 0.21, utils/transformers_weight_conversion.py, with transformers 5.24, conversion_mapping.py.
"""

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from jcrosslora.adapter.names import ending
from jcrosslora.checkpoint.wrapped import text_module_name

# Enough for a large model with a rank for each module: re itself caches 512 patterns and recompiles the others.
_KEPT = 1 << 14

# Families of bases with dense layers or shared experts.
_TAKEN = frozenset(
    {
        *("cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4_moe", "hunyuan_v1_moe"),
        *("qwen3_moe", "qwen3_next"),
    }
)
_TARGETS = ("gate_proj", "up_proj", "down_proj")


def is_taken(family: str | None, module: str) -> bool:
    """Whether peft takes a linear module of a base of this family for a part of the experts."""
    return family in _TAKEN and ending(module) in _TARGETS


def is_by_weight(config: Mapping[str, Any], module: str) -> bool:
    """Whether a configuration names the weight of a module, as peft matches it: whole, or its end from a dot on."""
    stated, weight = config.get("target_parameters"), f"{module}.weight"
    named = stated if isinstance(stated, list) else ()
    return any(weight == name or weight.endswith(f".{name}") for name in named)


def by_weight(modules: Iterable[str], family: str | None, config: Mapping[str, Any]) -> frozenset[str]:
    """Return the modules whose weights are to be named.

    Args:
        modules: the linear modules of an adapter.
        family: of its base; if None, the modules that its own file names so.
        config: of that file.
    """
    if family is None:
        return frozenset(name for name in modules if is_by_weight(config, name))
    return frozenset(name for name in modules if is_taken(family, name))


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


def _target_name(config: Mapping[str, Any], module: str) -> str:
    """Return what peft matches with the patterns: the module, or its weight if the configuration names that."""
    return f"{module}.weight" if is_by_weight(config, module) else module


def pattern_name(config: Mapping[str, Any], module: str) -> str:
    """Return the spelling of a module name that the patterns use: that of the file, else that of text models."""
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    return module if matching_key(patterns, _target_name(config, module)) else text_module_name(module)


def module_rank(config: Mapping[str, Any], module: str) -> int:
    """Return the rank that the configuration gives to a module (name without the PEFT prefix)."""
    return _pattern_value(config, "rank_pattern", "r", module)


def module_alpha(config: Mapping[str, Any], module: str, default: str = "lora_alpha") -> float:
    """Return the alpha that the configuration gives to a module (name without the PEFT prefix)."""
    return _pattern_value(config, "alpha_pattern", default, module)


def module_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732)."""
    return module_alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def file_scale(config: Mapping[str, Any], module: str, rank: int | None = None) -> float:
    """Return the scale of a module as its file spells it; None takes the rank of the configuration."""
    name = pattern_name(config, module)
    return module_scale(config, name, module_rank(config, name) if rank is None else rank)


def exact_pattern(module: str, *, by_weight: bool = False) -> str:
    """Return a key that matches this module and no other; or its weight too, which peft looks up if it is named."""
    return "^" + re.escape(module) + (r"(\.weight)?" if by_weight else "")


def _pattern_value(config: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    table = config.get(patterns) or {}
    key = matching_key(table, _target_name(config, module))
    return config[default] if key is None else table[key]


_NAME = 64  # typical characters of a module's name
_BUDGET = 1 << 22  # ways to match; `.*\.layers\.(0|1|...|31)\.(q|k|v|o)_proj` has 2^13
_SINGLE = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)  # an escaped character, or a set of characters
_GROUP_MARK = re.compile(r"\(\?(?::|[=!]|<[=!]|P<\w+>)")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def is_matchable(pattern: str) -> bool:
    """Whether a pattern is a regular expression without repeated groups, and with few ways to match.

    The number of ways is bounded by the product over its repeats, optional parts and alternatives.
    """
    try:
        re.compile(f"({pattern})$")
    except (re.error, RecursionError, OverflowError):
        return False
    plain = _GROUP_MARK.sub("(", _SINGLE.sub("x", pattern))
    repeats = sum(map(plain.count, "*+{"))
    if _REPEATED_GROUP.search(plain) or repeats > 4 or plain.count("?") > 16 or plain.count("(") > 16:
        return False
    ways = [1 + part.count("|") for part in re.split(r"[()]", plain)]
    return math.prod([*ways, _NAME**repeats, 2 ** plain.count("?")]) <= _BUDGET
