"""Read which layers of a model have sliding windows and which have no positions, by the rules of its family."""

from collections.abc import Mapping
from typing import Any

from jcrosslora.checkpoint import Family
from jcrosslora.checkpoint.family.rules import Windows
from jcrosslora.checkpoint.family.sizes import layer_kinds
from jcrosslora.errors import CheckpointError

FULL, SLIDING = "full_attention", "sliding_attention"
_CHUNKED = "chunked_attention"  # how configurations call layers with windows that are chunks
_NO_ROPE_PERIOD = 4  # default of `no_rope_layer_interval`


def read_layer_kinds(config: Mapping[str, Any], family: Family, layers: int, ref: str) -> tuple[str, ...]:
    """Return (L,) "full_attention" or "sliding_attention".

    Raises:
        CheckpointError: `layer_types` has another kind or length, or contradicts the rest of the configuration.
    """
    if family.mixer is not None:
        return (FULL,) * layers  # the parts of a layer say whether it has attention
    chunked = family.windows is not None and family.windows.chunked
    try:
        stated = layer_kinds(config, {FULL: FULL, _CHUNKED if chunked else SLIDING: SLIDING}, layers)
    except CheckpointError as error:
        msg = f"{ref}: {error}"
        raise CheckpointError(msg) from None
    if stated is None:
        return _implied_kinds(config, family, layers, ref)
    # transformers ignores the list for these families and uses sliding_window alone.
    if not (family.windows and family.windows.listed) and tuple(stated) != _implied_kinds(config, family, layers, ref):
        msg = f"{ref}: layer_types of a {family.name} model contradict its sliding_window"
        raise CheckpointError(msg)
    return tuple(stated)


def layer_windows(
    kinds: tuple[str, ...], config: Mapping[str, Any], family: Family, ref: str
) -> tuple[int | None, ...]:
    """Return (L,) the number of positions that each layer sees, its own included; None for full attention.

    Raises:
        CheckpointError: the window is not a positive integer, or a sliding layer has none.
    """
    window = read_window(config, family, ref)
    if window is None and SLIDING in kinds:
        key = (family.windows or Windows()).size_key
        msg = f"{ref}: layer {kinds.index(SLIDING)} has a window, but no {key} is set or in use"
        raise CheckpointError(msg)
    return tuple(window if kind == SLIDING else None for kind in kinds)


def read_window(config: Mapping[str, Any], family: Family, ref: str) -> int | None:
    """Return the number of positions that a sliding layer sees, None if no layer slides.

    Raises:
        CheckpointError: it is not a positive integer.
    """
    windows = family.windows
    if windows is None or (windows.switch is not None and not config.get(windows.switch)):
        return None
    window = config.get(windows.size_key, windows.size)
    if window is not None and (type(window) is not int or window <= 0):
        msg = f"{ref}: {windows.size_key} is {window!r}, wanted a positive integer or null"
        raise CheckpointError(msg)
    return window


def rotated_layers(kinds: tuple[str, ...], config: Mapping[str, Any], family: Family, ref: str) -> tuple[bool, ...]:
    """Return (L,) whether a layer has rotary positions.

    Raises:
        CheckpointError: `no_rope_layers` or `no_rope_layer_interval` cannot be read.
    """
    match family.positions.unrotated:
        case "no_rope_layers":
            return _listed_rotated(config, len(kinds), ref)
        case "full":
            return tuple(kind == SLIDING for kind in kinds)
        case "full beside windows":
            return tuple(kind == SLIDING or read_window(config, family, ref) is None for kind in kinds)
        case "full behind prefix":
            dense = config.get("prefix_dense_sliding_window_pattern") == 1
            parts = family.layer_parts(config, len(kinds))
            return tuple(
                kind == SLIDING or (dense and own.mlp == "dense") for kind, own in zip(kinds, parts, strict=True)
            )
        case "not rope":
            return (config.get("position_embedding_type") == "rope",) * len(kinds)
        case "no theta":
            stated = config.get("rope_parameters")
            still = isinstance(stated, Mapping) and "rope_theta" in stated and stated["rope_theta"] is None
            return (not still,) * len(kinds)
        case None:
            return (True,) * len(kinds)


def _listed_rotated(config: Mapping[str, Any], layers: int, ref: str) -> tuple[bool, ...]:
    stated = config.get("no_rope_layers")
    if not stated:
        period = _period(config, ("no_rope_layer_interval",), _NO_ROPE_PERIOD, ref)
        return tuple((layer + 1) % period != 0 for layer in range(layers))
    valid = isinstance(stated, list | tuple) and len(stated) >= layers and all(flag in (0, 1) for flag in stated)
    if not valid:
        msg = f"{ref}: no_rope_layers is {str(stated)[:60]}, wanted a list of 0 or 1 for each of {layers} layers"
        raise CheckpointError(msg)
    return tuple(bool(flag) for flag in stated[:layers])


def _implied_kinds(config: Mapping[str, Any], family: Family, layers: int, ref: str) -> tuple[str, ...]:
    window, windows = read_window(config, family, ref), family.windows or Windows()
    if windows.period is not None:
        period = _period(config, windows.period_keys, windows.period, ref)
        return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))
    if windows.which is not None:
        rotated, wanted = _listed_rotated(config, layers, ref), windows.which == "rotated"
        return tuple(SLIDING if window is not None and turns == wanted else FULL for turns in rotated)
    first = 0
    if windows.first is not None:
        key, default = windows.first
        first = config.get(key, default)
        if type(first) is not int:
            msg = f"{ref}: {key} is {first!r}, wanted an integer"
            raise CheckpointError(msg)
    return tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(layers))


def _period(config: Mapping[str, Any], keys: tuple[str, ...], default: int, ref: str) -> int:
    key, period = next(((key, config[key]) for key in keys if config.get(key)), ("", default))
    if type(period) is not int or period < 1:
        msg = f"{ref}: {key} is {period!r}, wanted a positive integer"
        raise CheckpointError(msg)
    return period
