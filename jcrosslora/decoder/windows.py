"""Read which layers use sliding windows, by the rule of each family."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.decoder.rope_settings import FULL, SLIDING
from jcrosslora.errors import CheckpointError

_WINDOW = 4096  # default of the configuration classes
_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # the last layer of each period has full attention


def read_layer_kinds(config: Mapping[str, Any], family: str, layers: int, ref: str) -> tuple[str, ...]:
    """Return (L,) "full_attention" or "sliding_attention".

    Raises:
        CheckpointError: `layer_types` has another kind or length, or contradicts the rest of the configuration.
    """
    implied = _implied_kinds(config, family, layers, ref)
    stated = config.get("layer_types")
    if stated is None:
        return implied
    if not isinstance(stated, list | tuple) or len(stated) != layers:
        msg = f"{ref}: layer_types is {stated!r}, wanted a list of {layers} kinds"
        raise CheckpointError(msg)
    unknown = [kind for kind in stated if kind not in (FULL, SLIDING)]
    if unknown:
        msg = f"{ref}: layer type {unknown[0]!r} is not supported; supported: {FULL}, {SLIDING}"
        raise CheckpointError(msg)
    # transformers ignores the list for these families and uses sliding_window alone.
    if family in ("mistral", "phi3", "llama") and tuple(stated) != implied:
        msg = f"{ref}: layer_types of a {family} model contradict its sliding_window"
        raise CheckpointError(msg)
    return tuple(stated)


def layer_windows(kinds: tuple[str, ...], config: Mapping[str, Any], family: str, ref: str) -> tuple[int | None, ...]:
    """Return (L,) the number of positions that each layer sees, its own included; None for full attention.

    Raises:
        CheckpointError: the window is not a positive integer, or a sliding layer has none.
    """
    window = _read_window(config, family, ref)
    if window is None and SLIDING in kinds:
        msg = f"{ref}: layer {kinds.index(SLIDING)} has sliding attention, but no sliding_window is set or in use"
        raise CheckpointError(msg)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _read_window(config: Mapping[str, Any], family: str, ref: str) -> int | None:
    if family == "llama" or (family in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        return None
    window = config.get("sliding_window", None if family == "phi3" else _WINDOW)
    if window is not None and (type(window) is not int or window <= 0):
        msg = f"{ref}: sliding_window is {window!r}, wanted a positive integer or null"
        raise CheckpointError(msg)
    return window


def _implied_kinds(config: Mapping[str, Any], family: str, layers: int, ref: str) -> tuple[str, ...]:
    window = _read_window(config, family, ref)
    if family in _PERIOD:
        period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PERIOD[family]
        if type(period) is not int or period < 1:
            msg = f"{ref}: sliding_window_pattern is {period!r}, wanted a positive integer"
            raise CheckpointError(msg)
        return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))
    first = config.get("max_window_layers", 28) if family in ("qwen2", "qwen3") else 0
    if type(first) is not int:
        msg = f"{ref}: max_window_layers is {first!r}, wanted an integer"
        raise CheckpointError(msg)
    return tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(layers))
