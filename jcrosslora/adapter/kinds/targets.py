"""Find the modules of a base that a configuration targets, in peft's order.

Needed for kinds whose files do not name their modules. Source: peft 0.21, check_target_module_exists in
tuners/tuners_utils.py.
"""

import re
from collections.abc import Mapping
from typing import Any

from jcrosslora.adapter.pattern_cost import is_matchable
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.errors import AdapterError

_HEAD = "lm_head"
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def targeted_shapes(config: Mapping[str, Any], base: BaseModel, where: str) -> dict[str, tuple[int, int]]:
    """Return (O, I) of every module that the configuration targets, by its name in the base.

    Args:
        config: of the adapter.
        base: the model it is for. Its modules are ordered layer by layer, q, k, v, o, gate, up, down, the head last.
        where: path of the configuration, for messages.

    Raises:
        AdapterError: the base has fused modules, whose order differs, or the configuration targets no module or
            cannot be parsed.
    """
    if base.fused:
        msg = f"{where}: the order of the modules of {base.family.name} bases is not known: save the adapter with its "
        msg += "indices (save_indices=True)"
        raise AdapterError(msg)
    shapes = {name: module.shape for name, module in base.modules.items()}
    every = shapes | {_HEAD: (base.dims.vocab, base.dims.hidden)}
    try:
        found = {name: shape for name, shape in every.items() if _is_target(config, name)}
    except (re.error, TypeError, AttributeError, RecursionError) as error:
        msg = f"{where}: its target_modules or layers cannot be parsed ({error}): correct the file"
        raise AdapterError(msg) from error
    if not found:
        msg = f"{where}: target_modules names no module of the base {base.name}: give the base it was trained on"
        raise AdapterError(msg)
    return found


def _is_target(config: Mapping[str, Any], name: str) -> bool:
    if any(_pattern(rf"(^|.*\.){saved}($|\..*)").match(name) for saved in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules") or ()
    if targets == "all-linear":
        return name != _HEAD
    if isinstance(targets, str):
        return _pattern(targets).fullmatch(name) is not None
    if name in targets:
        return True
    return any(name.endswith(f".{target}") for target in targets) and _is_layer(config, name)


def _pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern of the configuration.

    Raises:
        re.error: it is not a regular expression, or could take very long to match.
    """
    if not is_matchable(text):
        msg = f"{text[:60]!r} is not a regular expression, or has too many ways to match"
        raise re.error(msg)
    return re.compile(text)


def _is_layer(config: Mapping[str, Any], name: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    rules = [_pattern(rf"(?:^|.*?\.){pattern}\.(\d+)\.") for pattern in patterns] or [_LAYER]
    match = next((found for rule in rules if (found := rule.match(name))), None)
    return match is not None and int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
