"""The description of a format of quantised weights: how to recognise it, and how to open a weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jcrosslora.checkpoint.quantised.parts import Parts

Settings = Mapping[str, Any]  # the quantization_config of a config.json, {} if there is none


@dataclass(frozen=True)
class Packed:
    """One quantised matrix, or a stack of them, whose parts are checked to fit together.

    Attributes:
        shape: (O, I), or (E, O, I).
        dtype: storage dtype for reports, e.g. "NF4" or "F8_E4M3".
        rows: dequantises rows: (n,) row numbers, which count through all matrices -> float32 (n, I).
    """

    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """One format of quantised weights.

    Attributes:
        name: for messages.
        claims: whether the settings name this format.
        obstacle: why a checkpoint with settings of this format cannot be read, None if it can.
        holder: suffix of the tensor that holds the numbers of a module, e.g. ".qweight".
        parts: suffixes of tensors that belong to a quantised weight and are no tensors of the model.
        marks: suffixes that only this format has and that identify it without settings; if empty, settings are needed.
        open: opens one weight; None if its tensors are not in this format.
        ending: of the name of a weight, in place of `holder`.
    """

    name: str
    claims: Callable[[Settings], bool]
    obstacle: Callable[[Settings], str | None]
    holder: str
    parts: tuple[str, ...]
    marks: tuple[str, ...]
    open: Callable[[Parts, Settings], Packed | None]
    ending: str = ".weight"


def claims_method(*methods: str) -> Callable[[Settings], bool]:
    """Make a `claims` that compares `quant_method`."""
    return lambda settings: settings.get("quant_method") in methods


def no_obstacle(_: Settings) -> None:
    """Report no obstacle: every variant of the format can be read."""
