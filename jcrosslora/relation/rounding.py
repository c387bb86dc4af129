"""Infer the interval of originals that a stored weight may be rounded from, and the levels of quantised rows.

The interval is half a step to both sides; the step is that of a float format or of a block of a quantised row. If the
intervals of two weights overlap, they may be roundings of one original; otherwise the weights differ by more than
rounding.

The quantisation levels of a block are inferred from the numbers alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import ml_dtypes
import numpy as np

# Block lengths to try if a file does not state one; the whole row is tried as well.
BLOCKS = (16, 32, 64, 128)
# Relative rounding error of half precision, in which the scales of blocks are stored.
HALF_PRECISION = 2.0**-11
# Share of blocks that have to lie on a grid: a few hold equal numbers only, or were stored in half precision since.
MIN_ON_GRID = 0.95
_TOP = 127
_TRIED = 8  # steps tried on both sides of the one that the largest number, which the float rounded too, says
# Narrowest first: weights that all fit into one of these were rounded to it, even if stored in another dtype.
_FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}
_STORED_FLOATS = frozenset({"F64", "F32", *_FLOATS})
# Half a step relative to the number: fp8 has two or three bits of mantissa, and its scale moves the steps.
_FP8 = {"F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3, "F8_E4M3FNUZ": 2.0**-4, "F8_E5M2FNUZ": 2.0**-3}
# Formats of four bits whose levels are denser around zero. The levels of the floats are multiples of one step, but most
# multiples are no levels.
_UNEVEN = frozenset({"FP4", "NF4", "MXFP4", "NVFP4"})
# Types of ggml with one scale for 16 numbers; the others have one for 32.
_BLOCKS_OF_16 = frozenset({"Q2_K", "Q3_K", "Q6_K", "IQ1_M", "IQ2_S", "IQ2_XS", "NVFP4"})
_LEVELS = 256  # of a grid at most: 8 bits
# Allowed distance from a multiple of the step, in steps: half precision moves 4-bit levels by 0.02.
_OFF_STEP = 0.1
_GRID_ROWS = 8  # rows from which a grid is inferred


@dataclass(frozen=True, eq=False)
class RoundingIntervals:
    """The intervals that the numbers of a matrix may have been rounded from: float64, of the matrix's shape.

    Attributes:
        grid: the number format in words, such as "BF16", "Q4_0" or "a grid in blocks of 32".
        coarse: whether it is a quantisation to 8 bits or fewer.
        declared: whether the file states the format; otherwise it is inferred from the numbers.
    """

    low: np.ndarray
    high: np.ndarray
    grid: str
    coarse: bool
    declared: bool = True

    def at(self, index: Any) -> Self:
        """Take some of the numbers, as an array is indexed."""
        return replace(self, low=self.low[index], high=self.high[index])

    def times(self, scale: float | np.ndarray, error: float = 0.0) -> Self:
        """Multiply the numbers by a scale, or each by its scale, which may be off by a relative error."""
        ends = self.low * scale, self.high * scale
        low, high = np.minimum(*ends), np.maximum(*ends)
        return replace(self, low=low - error * np.abs(low), high=high + error * np.abs(high))

    @property
    def width(self) -> float:
        """Root mean square of high - low."""
        return float(np.sqrt(np.mean(np.square(self.high - self.low)))) if self.low.size else 0.0


def infer_rounding(rows: np.ndarray, dtype: str) -> RoundingIntervals:
    """Infer the rounding of rows of a weight from their stored dtype and, for floats, from the numbers.

    `rows` are float32 (n, I), whole and in their stored order; `dtype` is as the file states it, e.g. "BF16" or "Q4_K".
    """
    if dtype in _FP8:
        half = np.abs(rows.astype(np.float64)) * _FP8[dtype]
        return RoundingIntervals(rows - half, rows + half, dtype, coarse=True)
    if dtype not in _STORED_FLOATS:
        # A block never extends into the next row.
        block = math.gcd(rows.shape[1], 16 if dtype in _BLOCKS_OF_16 else 32)
        low, high = block_intervals(rows, block, even=dtype not in _UNEVEN)
        return RoundingIntervals(low, high, dtype, coarse=True)
    stored = float_rounding(rows, "F32" if dtype == "F64" else dtype)
    half, find = stored.high - rows, rows[:_GRID_ROWS]
    if (block := _find_absmax_block(find, half[:_GRID_ROWS])) is not None:
        low, high = _absmax_intervals(rows, half, block)
    elif (block := find_block(find)) is not None:
        low, high = block_intervals(rows, block)
    else:
        return stored
    return RoundingIntervals(low - half, high + half, f"a grid in blocks of {block}", coarse=True, declared=False)


def float_rounding(rows: np.ndarray, dtype: str = "F32") -> RoundingIntervals:
    """Return the rounding to the narrowest float format that holds all numbers, at most the stored one."""
    with np.errstate(over="ignore"):
        fits = [name for name, kind in _FLOATS.items() if (rows.astype(kind).astype(np.float32) == rows).all()]
    name = fits[0] if fits else dtype
    half = np.spacing(np.abs(rows).astype(_FLOATS.get(name, np.float32))).astype(np.float64) / 2
    return RoundingIntervals(rows - half, rows + half, name, coarse=False)


def block_intervals(rows: np.ndarray, block: int, *, even: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return the intervals of numbers that round to the levels of their block: float64 low and high, (n, I).

    Levels are multiples of the smallest distance in the block. In blocks of few levels that are not multiples, and in
    formats with uneven levels, the levels are the numbers that occur. The outermost numbers of a block may stand for
    numbers one step further out. A number in a block without a grid stands only for itself.

    `rows` are (n, I); `block` numbers share a scale, and `even` says whether the levels of the format are evenly
    spaced.
    """
    ranked = _rank(rows, block)
    step = ranked.step[:, None]
    below = above = np.broadcast_to(step, ranked.values.shape)
    uneven = ranked.few & ~ranked.uniform if even else ranked.step > 0
    if uneven.any():
        below, above = below.copy(), above.copy()
        below[uneven], above[uneven] = _neighbours(ranked.values[uneven], ranked.gaps[uneven])
    # Of uneven levels, half a gap is less than a third of the number, except at the smallest one; and the largest
    # number of a microscaled block may stand for one that is a third larger.
    outer = 1.5 * step if even else np.maximum(1.5 * step, np.abs(ranked.values) / 3)
    low = ranked.values - np.where(ranked.values == ranked.values[:, :1], outer, below / 2)
    high = ranked.values + np.where(ranked.values == ranked.values[:, -1:], outer, above / 2)
    # The rounding of its scale moves all levels of a block together.
    slack = HALF_PRECISION * np.abs(ranked.values).max(axis=1, keepdims=True)
    low, high = low - slack, high + slack
    on_grid = (ranked.uniform | ranked.few | uneven)[:, None]
    back = np.argsort(ranked.order, axis=1, kind="stable")
    low, high = (
        np.take_along_axis(np.where(on_grid, x, ranked.values), back, axis=1).reshape(rows.shape) for x in (low, high)
    )
    return low, high


def find_block(rows: np.ndarray) -> int | None:
    """Return the length of the blocks that rows (n, I) are quantised in; None if they are not."""
    found = None
    for block in (*BLOCKS, rows.shape[1]):
        if block < BLOCKS[0] or rows.shape[1] % block or not rows.size:
            continue
        ranked = _rank(rows, block)
        # A longer block needs one step: several short blocks together may have few levels by chance.
        share = float(np.mean(ranked.uniform if found else ranked.uniform | ranked.few))
        if share >= MIN_ON_GRID:
            found = block
        elif found or share == 0:  # nearly all parts of a block on a grid would lie on it too
            break
    return found


@dataclass(frozen=True, eq=False)
class _Ranked:
    """The sorted numbers of B blocks of M numbers.

    Attributes:
        order: (B, M), the index of each number in its block.
        values: (B, M).
        gaps: (B, M - 1), distances of neighbours, 0 if they are equal up to rounding.
        step: (B,), the common divisor of the gaps, or else the smallest gap; 0 if all gaps are 0.
        uniform: (B,), whether there is a common divisor.
        few: (B,), whether there are few different numbers.
    """

    order: np.ndarray
    values: np.ndarray
    gaps: np.ndarray
    step: np.ndarray
    uniform: np.ndarray
    few: np.ndarray


def _rank(rows: np.ndarray, block: int) -> _Ranked:
    numbers = rows.astype(np.float64).reshape(-1, block)
    order = np.argsort(numbers, axis=1, kind="stable")
    values = np.take_along_axis(numbers, order, axis=1)
    gaps = np.diff(values, axis=1)
    gaps[gaps <= 1e-6 * np.abs(numbers).max(axis=1, keepdims=True)] = 0
    smallest = np.where(gaps > 0, gaps, np.inf).min(axis=1, initial=np.inf)
    smallest = np.where(np.isfinite(smallest), smallest, 0)
    step, uniform = smallest, np.zeros(len(values), bool)
    # In a block of many levels no two numbers may be on neighbouring ones, so parts of the smallest gap are tried too.
    for part in (1, 2, 3):
        finer = _refine(smallest / part, gaps)
        steps = (values - values[:, :1]) / np.where(finer > 0, finer, 1)[:, None]
        fits = (np.abs(steps - np.round(steps)) < _OFF_STEP).all(axis=1) & (steps[:, -1] < _LEVELS) & (finer > 0)
        step = np.where(fits & ~uniform, finer, step)
        uniform |= fits
    few = (1 + np.count_nonzero(gaps, axis=1) <= min(block // 2, _LEVELS)) & (step > 0)
    return _Ranked(order, values, gaps, step, uniform, few)


def _refine(step: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Improve steps (B,) by averaging over longer and longer gaps, as multiples of the step."""
    step = step[:, None]
    for reach in (2.5, 6.5, 16.5, np.inf):
        with np.errstate(invalid="ignore"):  # A block of equal numbers has neither gaps nor a step.
            near = np.where(gaps <= reach * step, gaps, 0)
        counts = np.round(near / np.where(step > 0, step, 1)).sum(axis=1, keepdims=True)
        step = np.where(counts > 0, near.sum(axis=1, keepdims=True) / np.maximum(counts, 1), step)
    return step[:, 0]


def _neighbours(values: np.ndarray, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of sorted numbers to the next lower and the next higher level; 0 if there is none."""
    below, above = np.zeros_like(values), np.zeros_like(values)
    for column in range(1, values.shape[1]):
        changed = gaps[:, column - 1] > 0
        below[:, column] = np.where(changed, gaps[:, column - 1], below[:, column - 1])
        back = -1 - column
        above[:, back] = np.where(gaps[:, back + 1] > 0, gaps[:, back + 1], above[:, back + 1])
    return below, above


def _find_absmax_block(rows: np.ndarray, half: np.ndarray) -> int | None:
    """Return the length of the blocks of rows that are multiples of a 127th of their largest number; None without any.

    Rows that were rounded to 8 bits may be stored as floats. A float moves the upper levels by up to a quarter step, so
    that the gaps between numbers do not show the step.

    `rows` are (n, I), and `half` is half the distance to the next number of the float format.
    """
    for block in (*BLOCKS, rows.shape[1]):
        if block >= BLOCKS[0] and rows.shape[1] % block == 0 and rows.any():
            steps = _steps(rows, half, block)
            some = rows.reshape(-1, block).any(axis=1)  # zeros are multiples of anything
            if np.mean(steps[some] > 0) >= MIN_ON_GRID:
                return block
    return None


def _absmax_intervals(rows: np.ndarray, half: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the intervals of numbers that round to the levels of their block; see `block_intervals`."""
    numbers = rows.astype(np.float64).reshape(-1, block)
    # The rounding of its scale moves all levels of a block together.
    step = _steps(rows, half, block)[:, None]
    reach = np.where(step > 0, step / 2 + HALF_PRECISION * np.abs(numbers).max(axis=1, keepdims=True), 0)
    return (numbers - reach).reshape(rows.shape), (numbers + reach).reshape(rows.shape)


def _steps(rows: np.ndarray, half: np.ndarray, block: int) -> np.ndarray:
    """Return the step of each of B blocks; 0 if not all numbers are multiples of one."""
    numbers, half = (np.abs(x.astype(np.float64)).reshape(-1, block) for x in (rows, half))
    largest = np.argmax(numbers, axis=1)[:, None]
    top, off = (np.take_along_axis(x, largest, axis=1) for x in (numbers, half))
    found = np.zeros_like(top)
    for shift in range(-_TRIED, _TRIED + 1):
        step = (top + off * shift / _TRIED) / _TOP
        levels = numbers / np.where(step > 0, step, 1)
        fits = np.abs(levels - np.round(levels)) * step <= half + off / _TRIED
        found = np.where(fits.all(axis=1, keepdims=True) & (found == 0), step, found)
    return found[:, 0]
