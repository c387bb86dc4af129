"""Compute the rows of a merged tensor in blocks: W' = W + scale B A, or rows that replace those of W."""

from collections.abc import Callable, Iterator

import numpy as np

from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.adapter.token_updates import TokenUpdate
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.safetensors import DTYPES
from jcrosslora.errors import OutputError

_BLOCK = 1 << 24  # elements computed at a time, 64 MB as float32

# Factors that are added to a range of rows, a change of single rows, or a tensor that takes the place of all.
Updates = list[tuple[int, int, LoRAFactors] | TokenUpdate | np.ndarray]


def updates_of(adapter: Adapter, base: BaseModel) -> dict[str, Updates]:
    """Group the updates of an adapter by tensor of the base: tensor name -> updates of its rows.

    Args:
        adapter: with fused modules split, see `fit_to_base`.
        base: that the adapter is for.
    """
    found: dict[str, Updates] = {
        name: [np.asarray(array)] for group in adapter.replaced for name, array in group.tensors.items()
    }
    for name, factors in adapter.modules.items():
        module = base.modules[name]
        start, stop = module.rows or (0, module.shape[0])
        found.setdefault(module.tensor, []).append((start, stop, factors))
    for update in adapter.tokens:
        for name in update.modules:
            found.setdefault(f"{name}.weight", []).append(update)
    return found


def row_blocks(base: BaseModel, read: Callable[[], np.ndarray], updates: Updates, dtype: str) -> Iterator[np.ndarray]:
    """Yield a tensor with its updates, block by block.

    Args:
        base: its memory maps are released after each block.
        read: returns the base's tensor.
        updates: of the tensor; an empty list keeps its values.
        dtype: as the header names it.

    Raises:
        OutputError: values that do not fit the dtype.
    """
    array = read()
    for start, stop in _spans(array.shape):
        block = array[start:stop] if array.ndim else array
        yield _cast(_updated(block, start, updates), dtype) if updates else _cast(block, dtype)
        base.release()


def converted_rows(
    base: BaseModel, name: str, shape: tuple[int, ...], updates: Updates, dtype: str
) -> Iterator[np.ndarray]:
    """Yield a matrix with its updates like `row_blocks`, dequantised a block at a time.

    Args:
        base: that holds the matrix.
        name: of the matrix.
        shape: of the matrix.
        updates: of the matrix.
        dtype: as the header names it.

    Raises:
        OutputError: values that do not fit the dtype.
    """
    for start, stop in _spans(shape):
        block = base.rows(name, np.arange(start, stop))
        yield _cast(_updated(block, start, updates), dtype)
        base.release()


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last (exclusive) row of each block."""
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def _updated(block: np.ndarray, first: int, updates: Updates) -> np.ndarray:
    """Apply the updates to rows of W from `first` on; float32, or float64 if W is."""
    wide = np.float64 if block.dtype == np.float64 else np.float32
    result = block.astype(wide)
    for update in updates:
        if isinstance(update, np.ndarray):
            result[...] = update[first : first + len(block)]
            continue
        if isinstance(update, TokenUpdate):
            part = slice(*np.searchsorted(update.ids, (first, first + len(block))))
            places = update.ids[part] - first
            result[places] = update.changed(result[places], part)
            continue
        start, stop, factors = update
        low, high = max(start, first), min(stop, first + len(block))
        if low < high:
            b = np.asarray(factors.b)[low - start : high - start].astype(np.float64) * factors.scale
            result[low - first : high - first] += b.astype(wide) @ np.asarray(factors.a).astype(wide)
    return result


def _cast(block: np.ndarray, dtype: str) -> np.ndarray:
    kind = DTYPES[dtype]
    if block.dtype == kind:
        return block
    with np.errstate(over="ignore"):
        cast = block.astype(kind)
    if not np.isfinite(cast).all() and np.isfinite(block).all():
        msg = f"weights up to {np.abs(block).max():.3g} do not fit {kind.name}: write them with --dtype bfloat16"
        raise OutputError(msg)
    return cast
