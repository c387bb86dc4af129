"""Sample rows of weights: evenly spaced and the same on every run, so that most of a file is never read."""

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import CheckpointError
from jcrosslora.lineage.structure import Structure

Sample = tuple[np.ndarray, np.ndarray]


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """Return at most `wanted` different integers from 0 to count - 1, evenly spaced and with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def module_rows(base: BaseModel, name: str, ids: np.ndarray) -> np.ndarray:
    """Read rows of a linear module; in a fused matrix, ids count from the module's first row.

    Args:
        base: the base.
        name: the module's name.
        ids: (n,) integers, rows of the module.

    Returns:
        float32 (n, I).

    Raises:
        CheckpointError: a row does not exist, or holds NaN or infinity.
    """
    module = base.modules[name]
    first = 0 if module.rows is None else module.rows[0]
    return check_finite(base, name, base.rows(module.tensor, first + ids))


def counterpart_rows(
    source: BaseModel, target: BaseModel, structure: Structure, name: str, count: int
) -> tuple[Sample, Sample] | None:
    """Read rows of a target module and the source rows that they correspond to.

    Args:
        source: the source base.
        target: the target base.
        structure: which part of the source each part of the target is.
        name: of the target module.
        count: rows to read at most, evenly spaced over those with a counterpart.

    Returns:
        For the source and for the target: float32 (n, I) whole rows and (m,) the columns that correspond. None if the
        module has no counterpart.

    Raises:
        CheckpointError: a row holds NaN or infinity.
    """
    module = target.modules[name]
    other = structure.counterpart(module)
    outputs, inputs = structure.outputs(module.layer, module.role), structure.inputs(module.layer, module.role)
    if other is None or outputs is None or inputs is None:
        return None
    rows, columns = np.flatnonzero(outputs >= 0), np.flatnonzero(inputs >= 0)
    if not (len(rows) and len(columns)):
        return None
    rows = rows[evenly_spaced(len(rows), count)]
    src = module_rows(source, other, outputs[rows])
    return (src, inputs[columns]), (module_rows(target, name, rows), columns)


def check_finite(base: BaseModel, name: str, array: np.ndarray) -> np.ndarray:
    """Return the array unchanged.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not np.isfinite(array).all():
        msg = f"{base.ref}: the weight of {name} holds NaN or infinity; the file is damaged, download it again"
        raise CheckpointError(msg)
    return array
