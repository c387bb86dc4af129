"""Pick some of many items, evenly spaced and the same on every run."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """Return at most `wanted` different, evenly spaced integers from 0 to count - 1, including both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def pick_evenly(items: Sequence[T], count: int) -> tuple[T, ...]:
    """Take at most `count` evenly spaced items, including the first and the last."""
    return tuple(items[int(place)] for place in evenly_spaced(len(items), count))


def from_start(items: Sequence[T], count: int) -> tuple[T, ...]:
    """Take at most `count` items, the first of each of `count` equal parts."""
    return tuple(items[part * len(items) // count] for part in range(count)) if len(items) > count else tuple(items)
