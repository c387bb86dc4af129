"""Rows that were rounded to 8 bits and are stored as floats: the largest number of each block is 127 steps.

A float moves the upper levels by up to a quarter step, so that the gaps between numbers do not show the step.
"""

import numpy as np

# Block lengths to try if a file does not state one; the whole row is tried as well.
BLOCKS = (16, 32, 64, 128)
# Relative rounding error of half precision, in which the scales of blocks are stored.
HALF_PRECISION = 2.0**-11
# Share of blocks that have to lie on a grid: a few hold equal numbers only, or were stored in half precision since.
MIN_ON_GRID = 0.95
_TOP = 127
_TRIED = 8  # steps tried on both sides of the one that the largest number, which the float rounded too, says


def find_absmax_block(rows: np.ndarray, half: np.ndarray) -> int | None:
    """Return the length of the blocks of rows that are multiples of a 127th of their largest number; None without any.

    Args:
        rows: (n, I), whole rows.
        half: (n, I), half the distance to the next number of the float format.
    """
    for block in (*BLOCKS, rows.shape[1]):
        if block >= BLOCKS[0] and rows.shape[1] % block == 0 and rows.any():
            steps = _steps(rows, half, block)
            some = rows.reshape(-1, block).any(axis=1)  # zeros are multiples of anything
            if np.mean(steps[some] > 0) >= MIN_ON_GRID:
                return block
    return None


def absmax_intervals(rows: np.ndarray, half: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the intervals of numbers that round to the levels of their block; see `block_intervals`."""
    numbers = rows.astype(np.float64).reshape(-1, block)
    # The rounding of its scale moves all levels of a block together.
    step = _steps(rows, half, block)[:, None]
    reach = np.where(step > 0, step / 2 + HALF_PRECISION * np.abs(numbers).max(axis=1, keepdims=True), 0)
    return (numbers - reach).reshape(rows.shape), (numbers + reach).reshape(rows.shape)


def _steps(rows: np.ndarray, half: np.ndarray, block: int) -> np.ndarray:
    """Return the step of each of B blocks; 0 where not all numbers are multiples of one."""
    numbers, half = (np.abs(x.astype(np.float64)).reshape(-1, block) for x in (rows, half))
    largest = np.argmax(numbers, axis=1)[:, None]
    top, off = (np.take_along_axis(x, largest, axis=1) for x in (numbers, half))
    found = np.zeros_like(top)
    for place in range(-_TRIED, _TRIED + 1):
        step = (top + off * place / _TRIED) / _TOP
        levels = numbers / np.where(step > 0, step, 1)
        fits = np.abs(levels - np.round(levels)) * step <= half + off / _TRIED
        found = np.where(fits.all(axis=1, keepdims=True) & (found == 0), step, found)
    return found[:, 0]
