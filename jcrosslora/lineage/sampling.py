"""Rows of a base that stand for the whole: evenly spread, the same on every run, and no others are read."""

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import CheckpointError


def even(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` different integers from 0 to count - 1, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def module_rows(base: BaseModel, name: str, ids: np.ndarray) -> np.ndarray:
    """float32 (n, I): rows of a linear module, counted within it where it is part of a fused matrix.

    Args:
        base: the base.
        name: the module's name.
        ids: (n,) integers, rows of the module.

    Raises:
        CheckpointError: no such row, or it holds NaN or infinity.
    """
    module = base.modules[name]
    first = 0 if module.rows is None else module.rows[0]
    return finite(base, name, base.rows(module.tensor, first + ids))


def finite(base: BaseModel, name: str, array: np.ndarray) -> np.ndarray:
    """The array itself.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not np.isfinite(array).all():
        msg = f"{base.ref}: the weight of {name} holds NaN or infinity; the file is damaged, download it again"
        raise CheckpointError(msg)
    return array
