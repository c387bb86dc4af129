"""Which numbers a stored weight may have been rounded from, told by the grid that it lies on.

A rounded number leaves an interval of originals: half a step to both sides, where the step is that of a float format,
or that of a block of a quantised row. Two weights whose intervals meet may be roundings of one original; where they
do not, something else has changed as well.
"""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

# Narrowest first: weights that all fit into one of these were rounded to it, whatever they are stored as.
_FLOATS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}
_STORED_FLOATS = frozenset({"F64", "F32", *_FLOATS})
# An fp8 weight has three bits behind the leading one or two; its scale moves where its steps lie.
_EIGHT_BITS = {"F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3, "F8_E4M3FNUZ": 2.0**-4, "F8_E5M2FNUZ": 2.0**-3}
# Four bits whose levels lie closer around zero. Those of the floats are multiples of one step, but most multiples are
# no levels.
_UNEVEN = frozenset({"FP4", "NF4", "MXFP4", "NVFP4"})
# ggml's types with one scale for 16 numbers; the others have one for 32.
_SIXTEENS = frozenset({"Q2_K", "Q3_K", "Q6_K", "IQ1_M", "IQ2_S", "IQ2_XS", "NVFP4"})
# Block lengths to look for where a file does not say; the whole row is tried as well.
_BLOCKS = (16, 32, 64, 128)
# A grid has at most as many levels: 8 bits.
_LEVELS = 256
# Share of blocks that have to lie on a grid: a few hold equal numbers only, or were stored in half precision since.
_GRIDDED = 0.95
# How far from a multiple of the step a number may lie, in steps: half precision moves 4-bit levels by 0.02.
_OFF_STEP = 0.1
# Rounding to half precision, in which scales of blocks are kept, relative to the number.
HALF_PRECISION = 2.0**-11
_SEEN = 8  # rows by which a grid is recognised


@dataclass(frozen=True, eq=False)
class Rounding:
    """What the numbers of a matrix may have been rounded from.

    Attributes:
        low: float64, of the matrix's shape.
        high: the same.
        grid: the format in words, such as "BF16", "Q4_0" or "blocks of 32".
        coarse: whether it is a quantisation, of 8 bits or fewer.
        declared: whether the file says so; else it is seen in the numbers.
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


def rounding_of(rows: np.ndarray, dtype: str) -> Rounding:
    """The rounding that rows of a weight have been through.

    Args:
        rows: float32 (n, I), whole rows in their stored order.
        dtype: as the file states it, e.g. "BF16" or "Q4_K".
    """
    if dtype in _EIGHT_BITS:
        half = np.abs(rows.astype(np.float64)) * _EIGHT_BITS[dtype]
        return Rounding(rows - half, rows + half, dtype, coarse=True)
    if dtype not in _STORED_FLOATS:
        # A block does not reach into the next row, whatever the width.
        block = math.gcd(rows.shape[1], 16 if dtype in _SIXTEENS else 32)
        low, high = _blocks(rows, block, even=dtype not in _UNEVEN)
        return Rounding(low, high, dtype, coarse=True)
    stored = float_rounding(rows, "F32" if dtype == "F64" else dtype)
    block = _find_block(rows[:_SEEN])
    if block is not None:
        low, high = _blocks(rows, block)
        low, high = low - (rows - stored.low), high + (stored.high - rows)
        return Rounding(low, high, f"a grid in blocks of {block}", coarse=True, declared=False)
    return stored


def float_rounding(rows: np.ndarray, dtype: str = "F32") -> Rounding:
    """The rounding to the narrowest float format that holds the numbers, at most the one that they are stored in."""
    with np.errstate(over="ignore"):
        fits = [name for name, kind in _FLOATS.items() if (rows.astype(kind).astype(np.float32) == rows).all()]
    name = fits[0] if fits else dtype
    half = np.spacing(np.abs(rows).astype(_FLOATS.get(name, np.float32))).astype(np.float64) / 2
    return Rounding(rows - half, rows + half, name, coarse=False)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """The numbers of every block in order.

    Attributes:
        order: (B, M), where each was in its block.
        values: (B, M), the numbers.
        gaps: (B, M - 1), distances of neighbours, 0 for what is equal but for rounding.
        step: (B,), what all gaps are multiples of, or else the smallest of them; 0 if all are 0.
        uniform: (B,), whether there is such a step.
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
    # In a block of many levels no two numbers may be neighbours.
    for part in (1, 2, 3):
        finer = _refined(smallest / part, gaps)
        steps = (values - values[:, :1]) / np.where(finer > 0, finer, 1)[:, None]
        fits = (np.abs(steps - np.round(steps)) < _OFF_STEP).all(axis=1) & (steps[:, -1] < _LEVELS) & (finer > 0)
        step = np.where(fits & ~uniform, finer, step)
        uniform |= fits
    few = (1 + np.count_nonzero(gaps, axis=1) <= min(block // 2, _LEVELS)) & (step > 0)
    return _Ranked(order, values, gaps, step, uniform, few)


def _refined(step: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """(B,): a step made exact by longer and longer gaps, as far as they are multiples of it."""
    step = step[:, None]
    for reach in (2.5, 6.5, 16.5, np.inf):
        with np.errstate(invalid="ignore"):  # A block of equal numbers has neither gaps nor a step.
            near = np.where(gaps <= reach * step, gaps, 0)
        counts = np.round(near / np.where(step > 0, step, 1)).sum(axis=1, keepdims=True)
        step = np.where(counts > 0, near.sum(axis=1, keepdims=True) / np.maximum(counts, 1), step)
    return step[:, 0]


def _find_block(rows: np.ndarray) -> int | None:
    """The length of the blocks that rows are quantised in; None if they are not."""
    found = None
    for block in (*_BLOCKS, rows.shape[1]):
        if block < _BLOCKS[0] or rows.shape[1] % block or not rows.size:
            continue
        ranked = _rank(rows, block)
        # A longer block has to have one step: several short ones together may seem to have few levels.
        share = float(np.mean(ranked.uniform if found else ranked.uniform | ranked.few))
        if share >= _GRIDDED:
            found = block
        elif found or share == 0:  # the parts of a block that lies on a grid lie on it too, or most of them
            break
    return found


def _blocks(rows: np.ndarray, block: int, *, even: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Low and high of numbers rounded to the levels of their block.

    Levels are multiples of the block's smallest distance; where they are not, but few, and where a format is not even,
    they are those that occur. The outermost numbers of a block may stand for some that lie a step further out. A block
    that lies on no grid was rounded from nothing but itself.
    """
    ranked = _rank(rows, block)
    step = ranked.step[:, None]
    below = above = np.broadcast_to(step, ranked.values.shape)
    uneven = ranked.few & ~ranked.uniform if even else ranked.step > 0
    if uneven.any():
        below, above = below.copy(), above.copy()
        below[uneven], above[uneven] = _neighbours(ranked.values[uneven], ranked.gaps[uneven])
    # Half a gap above all but the smallest of uneven levels is less than a third of the number, and the largest of a
    # microscaled block may stand for one that is a third above it.
    outer = 1.5 * step if even else np.maximum(1.5 * step, np.abs(ranked.values) / 3)
    low = ranked.values - np.where(ranked.values == ranked.values[:, :1], outer, below / 2)
    high = ranked.values + np.where(ranked.values == ranked.values[:, -1:], outer, above / 2)
    # The scale of a block is kept in half precision, in which all of its levels move together.
    slack = HALF_PRECISION * np.abs(ranked.values).max(axis=1, keepdims=True)
    low, high = low - slack, high + slack
    on_grid = (ranked.uniform | ranked.few | uneven)[:, None]
    back = np.argsort(ranked.order, axis=1, kind="stable")
    low, high = (
        np.take_along_axis(np.where(on_grid, x, ranked.values), back, axis=1).reshape(rows.shape) for x in (low, high)
    )
    return low, high


def _neighbours(ranked: np.ndarray, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances to the next lower and the next higher level, for numbers in order; 0 where there is none."""
    below, above = np.zeros_like(ranked), np.zeros_like(ranked)
    for place in range(1, ranked.shape[1]):
        new = gaps[:, place - 1] > 0
        below[:, place] = np.where(new, gaps[:, place - 1], below[:, place - 1])
        back = -1 - place
        above[:, back] = np.where(gaps[:, back + 1] > 0, gaps[:, back + 1], above[:, back + 1])
    return below, above
