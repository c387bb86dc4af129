"""Scales or zero points of a matrix: one for all, one per row, or one per block of rows and columns."""

from collections.abc import Callable

import numpy as np

Rows = Callable[[np.ndarray], np.ndarray]


def scale_rows(values: np.ndarray, shape: tuple[int, int], block: tuple[int, int] | None = None) -> Rows | None:
    """Return a function that gives the scales of rows.

    Args:
        values: one number, (O,), (O, 1), or (ceil(O / block rows), ceil(I / block columns)).
        shape: (O, I) of the matrix.
        block: rows and columns of a block; the default is the ratio of the shapes.

    Returns:
        A function (n,) row numbers -> float32 that broadcasts to (n, I); None if the values fit none of these layouts.
    """
    if values.size == 1:
        return lambda _: values.reshape(1, 1).astype(np.float32)
    if values.shape in ((shape[0],), (shape[0], 1)):
        return lambda ids: values.reshape(-1, 1)[ids].astype(np.float32)
    size = (block or _ratio(shape, values.shape)) if values.ndim == 2 else None
    if size is None or values.shape != tuple(-(-n // step) for n, step in zip(shape, size, strict=True)):
        return None
    rows, columns = size[0], np.arange(shape[1]) // size[1]
    # Converted on demand: float32 scales of small groups, kept for a whole model, take an eighth of a byte per number.
    return lambda ids: values[ids // rows].astype(np.float32)[:, columns]


def _ratio(shape: tuple[int, int], blocks: tuple[int, ...]) -> tuple[int, int] | None:
    if any(count == 0 or n % count for n, count in zip(shape, blocks, strict=True)):
        return None
    return max(shape[0] // blocks[0], 1), max(shape[1] // blocks[1], 1)
