"""Linear modules that peft adapts only if their weight is named (`target_parameters`) and not the module.

transformers 5 holds all experts of a layer in one parameter. In the classes of `_TAKEN` peft takes every target called
gate_proj, up_proj or down_proj, by its whole name too, for that parameter, and the factors of dense layers and of
shared experts are lost. The names and shapes of the factors are the same in both forms, so other engines read either.

Source: peft 0.21, utils/transformers_weight_conversion.py, with transformers 5.24, conversion_mapping.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from jcrosslora.adapter.names import ending

# Those of its classes that have dense layers or shared experts.
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
        family: of its base; None if that is not known, for which the form of its own file stays.
        config: of that file.
    """
    if family is None:
        return frozenset(name for name in modules if is_by_weight(config, name))
    return frozenset(name for name in modules if is_taken(family, name))
