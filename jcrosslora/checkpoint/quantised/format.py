"""What a format of quantised weights is: how it is recognised, and how one weight of it is opened."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jcrosslora.checkpoint.quantised.parts import Parts

Settings = Mapping[str, Any]  # the quantization_config of a config.json, {} where there is none


@dataclass(frozen=True)
class Packed:
    """One quantised matrix whose parts have been checked against each other.

    Attributes:
        shape: (O, I).
        dtype: how it is stored, for reports, e.g. "NF4" or "F8_E4M3".
        rows: (n,) row numbers -> float32 (n, I); the other rows are not dequantised.
    """

    shape: tuple[int, int]
    dtype: str
    rows: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: for messages.
        claims: whether the settings name it.
        obstacle: why a checkpoint with these settings, which it claims, cannot be read; None if it can.
        holder: what follows a module's name in the tensor that holds its numbers, e.g. ".qweight".
        parts: endings of tensors that belong to a quantised weight and are no tensors of the model.
        marks: endings that only this format has, by which it is known where there are no settings; without any, it
            cannot be read without settings.
        open: opens one weight; None where its tensors say that it is not stored in this format.
    """

    name: str
    claims: Callable[[Settings], bool]
    obstacle: Callable[[Settings], str | None]
    holder: str
    parts: tuple[str, ...]
    marks: tuple[str, ...]
    open: Callable[[Parts, Settings], Packed | None]


def claims_method(*methods: str) -> Callable[[Settings], bool]:
    """A `claims` that compares `quant_method`."""
    return lambda settings: settings.get("quant_method") in methods


def no_obstacle(_: Settings) -> None:
    """The `obstacle` of a format that is read in every variant."""
