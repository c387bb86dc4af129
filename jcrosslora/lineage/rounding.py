"""Infer which numbers a stored weight may have been rounded from.

A rounded number leaves an interval of possible originals: half a step to both sides, where the step is that of a float
format or of a block of a quantised row. Two weights with overlapping intervals may be roundings of one original;
without overlap, something else has changed as well.
"""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from jcrosslora.lineage.quantisation_grid import block_intervals, find_block

# Narrowest first: weights that all fit into one of these were rounded to it, whatever their stored dtype.
_FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}
_STORED_FLOATS = frozenset({"F64", "F32", *_FLOATS})
# Half a step relative to the number: fp8 has two or three bits of mantissa, and its scale moves the steps.
_FP8 = {"F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3, "F8_E4M3FNUZ": 2.0**-4, "F8_E5M2FNUZ": 2.0**-3}
# Formats of four bits whose levels are denser around zero. The levels of the floats are multiples of one step, but most
# multiples are no levels.
_UNEVEN = frozenset({"FP4", "NF4", "MXFP4", "NVFP4"})
# Types of ggml with one scale for 16 numbers; the others have one for 32.
_BLOCKS_OF_16 = frozenset({"Q2_K", "Q3_K", "Q6_K", "IQ1_M", "IQ2_S", "IQ2_XS", "NVFP4"})
_GRID_ROWS = 8  # rows from which a grid is inferred


@dataclass(frozen=True, eq=False)
class Rounding:
    """The intervals that the numbers of a matrix may have been rounded from.

    Attributes:
        low: float64, of the matrix's shape.
        high: float64, of the matrix's shape.
        grid: the number format in words, such as "BF16", "Q4_0" or "a grid in blocks of 32".
        coarse: whether it is a quantisation to 8 bits or fewer.
        declared: whether the file states the format; otherwise it is inferred from the numbers.
    """

    low: np.ndarray
    high: np.ndarray
    grid: str
    coarse: bool
    declared: bool = True

    @property
    def width(self) -> float:
        """Root mean square of high - low."""
        return float(np.sqrt(np.mean(np.square(self.high - self.low)))) if self.low.size else 0.0


def infer_rounding(rows: np.ndarray, dtype: str) -> Rounding:
    """Infer the rounding of rows of a weight from their stored dtype and, for floats, from the numbers.

    Args:
        rows: float32 (n, I), whole rows in their stored order.
        dtype: as the file states it, e.g. "BF16" or "Q4_K".
    """
    if dtype in _FP8:
        half = np.abs(rows.astype(np.float64)) * _FP8[dtype]
        return Rounding(rows - half, rows + half, dtype, coarse=True)
    if dtype not in _STORED_FLOATS:
        # A block does not extend into the next row, whatever the width.
        block = math.gcd(rows.shape[1], 16 if dtype in _BLOCKS_OF_16 else 32)
        low, high = block_intervals(rows, block, even=dtype not in _UNEVEN)
        return Rounding(low, high, dtype, coarse=True)
    stored = float_rounding(rows, "F32" if dtype == "F64" else dtype)
    block = find_block(rows[:_GRID_ROWS])
    if block is not None:
        low, high = block_intervals(rows, block)
        low, high = low - (rows - stored.low), high + (stored.high - rows)
        return Rounding(low, high, f"a grid in blocks of {block}", coarse=True, declared=False)
    return stored


def float_rounding(rows: np.ndarray, dtype: str = "F32") -> Rounding:
    """Return the rounding to the narrowest float format that holds all numbers, at most the stored one."""
    with np.errstate(over="ignore"):
        fits = [name for name, kind in _FLOATS.items() if (rows.astype(kind).astype(np.float32) == rows).all()]
    name = fits[0] if fits else dtype
    half = np.spacing(np.abs(rows).astype(_FLOATS.get(name, np.float32))).astype(np.float64) / 2
    return Rounding(rows - half, rows + half, name, coarse=False)
