"""Read which layers of a model have sliding windows, by the rules of its family."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.architectures.blocks import RecurrentBlock
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.rules import FULL, SLIDING, Windows
from jcrosslora.architectures.sizes import layer_kinds, listed_rotated, period_of
from jcrosslora.errors import CheckpointError

_CHUNKED = "chunked_attention"  # how configurations call layers with windows that are chunks


def read_layer_kinds(config: Mapping[str, Any], family: Family, layers: int) -> tuple[str, ...]:
    """Return (L,) "full_attention" or "sliding_attention".

    Raises:
        CheckpointError: `layer_types` has another kind or length, or contradicts the rest of the configuration.
    """
    if any(issubclass(block, RecurrentBlock) for block in family.blocks):
        return (FULL,) * layers  # `layer_types` says which layers have attention
    chunked = family.windows is not None and family.windows.chunked
    stated = layer_kinds(config, {FULL: FULL, _CHUNKED if chunked else SLIDING: SLIDING}, layers)
    if stated is None:
        return _implied_kinds(config, family, layers)
    # transformers ignores the list for these families and uses sliding_window alone.
    if not (family.windows and family.windows.listed) and tuple(stated) != _implied_kinds(config, family, layers):
        msg = f"layer_types of a {family.name} model contradict its sliding_window"
        raise CheckpointError(msg)
    return tuple(stated)


def layer_windows(kinds: tuple[str, ...], config: Mapping[str, Any], family: Family) -> tuple[int | None, ...]:
    """Return (L,) the number of positions that each layer sees, its own included; None for full attention.

    Raises:
        CheckpointError: the window is not a positive integer, or a sliding layer has none.
    """
    window = read_window(config, family)
    if window is None and SLIDING in kinds:
        key = (family.windows or Windows()).size_key
        msg = f"layer {kinds.index(SLIDING)} has a window, but no {key} is set or in use"
        raise CheckpointError(msg)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def read_window(config: Mapping[str, Any], family: Family) -> int | None:
    """Return the number of positions that a sliding layer sees, None if no layer slides.

    Raises:
        CheckpointError: it is not a positive integer.
    """
    windows = family.windows
    if windows is None or (windows.switch is not None and not config.get(windows.switch)):
        return None
    window = config.get(windows.size_key, windows.size)
    if window is not None and (type(window) is not int or window <= 0):
        msg = f"{windows.size_key} is {window!r}, wanted a positive integer or null"
        raise CheckpointError(msg)
    return window


def _implied_kinds(config: Mapping[str, Any], family: Family, layers: int) -> tuple[str, ...]:
    window, windows = read_window(config, family), family.windows or Windows()
    if windows.period is not None:
        period = period_of(config, windows.period_keys, windows.period)
        return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))
    if windows.which is not None:
        rotated, wanted = listed_rotated(config, layers), windows.which == "rotated"
        return tuple(SLIDING if window is not None and turns == wanted else FULL for turns in rotated)
    first = 0
    if windows.first is not None:
        key, default = windows.first
        first = config.get(key, default)
        if type(first) is not int:
            msg = f"{key} is {first!r}, wanted an integer"
            raise CheckpointError(msg)
    return tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(layers))
