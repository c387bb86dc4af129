"""Classify the difference of two weight matrices: none, scaling, rounding, a low-rank update, or training."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import numpy as np

from jcrosslora.relation.rounding import HALF_PRECISION, RoundingIntervals

Side = Literal["source", "target"]

# Least share of numbers with overlapping rounding intervals for rounding alone to explain the difference; rounding to
# the nearest level explains nearly all of them. The steps of a grid that was inferred from the numbers are less exact.
_MIN_EXPLAINED, _MIN_EXPLAINED_INFERRED = 0.998, 0.99
# Least ratio of the steps of both sides for one to be a rounding of the other: bfloat16 has eight times the step of
# float16, while two formats of four bits differ by a tenth.
_COARSER = 1.5
# Least mean rounding error in steps. Uniform errors have a mean of a quarter step; steps at the ends of a block are
# taken for three times as wide, and those of floats twice as wide below a power of two.
_MIN_ERROR = 0.1
# Least step of coarse levels, relative to the root mean square of the numbers: 4 bits have about 0.3, 5 bits 0.14.
_COARSE_STEP = 0.2
# Levels that were rounded a second time moved by less than this share of a step.
_SAME_LEVEL = 0.25
# Relative difference of float32 sums of some thousands of products in different orders (24 bits of mantissa).
FLOAT32_NOISE = 2.0**-20
# A scale explains a difference if it leaves less than a tenth of it and differs from 1 by more than a thousandth.
_MAX_UNSCALED, _MIN_SCALE_CHANGE = 0.1, 1e-3
# A low-rank update has at most half of the directions, which hold 70% of the energy; rounding noise holds the rest.
_MAX_RANK_SHARE, _MIN_RANK_ENERGY = 0.5, 0.7
# Least share of zeros beyond rounding from which a matrix counts as pruned. Quantisers leave a tenth of zeros and more,
# but hardly any of numbers that their steps cannot have rounded to zero.
_MIN_ZEROED = 0.1
# Factor on the limit sigma (sqrt(n) + sqrt(m)) of the singular values of noise, because rounding errors of neighbours
# in a block are not quite independent.
_NOISE_EDGE = 2.0


class Change(StrEnum):
    """The kind of difference of two matrices."""

    EQUAL = "equal"
    ROUNDED = "rounded"
    LOW_RANK = "low rank"
    TRAINED_OR_ROUNDED = "trained or rounded"  # the two cannot be told apart
    TRAINED = "trained"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of a target matrix from its counterpart in the source.

    Attributes:
        distance: ||W_tgt - W_src||_F / ||W_src||_F, with W_src scaled.
        scale: the factor on the source's numbers, 1 unless it explains most of the difference.
        explained: share of numbers that are equal or that rounding explains.
        rank: rank of a low-rank update, as far as the sample shows it; else None.
        grids: the number formats of the source and the target.
        rounded: the side that is a rounding of the other; None if neither is, or it cannot be told.
        quantised: whether one side was quantised to 8 bits or fewer, alone or in addition to the change.
        coarse: whether the source, and the target, has levels as coarse as those of about 4 bits or fewer.
        hidden: relative size of changes that rounding may hide.
        zeroed: share of numbers that were set to zero in the target (unstructured pruning), if rounding does not
            explain it; all other figures are then of the rest.
    """

    change: Change
    cosine: float
    distance: float
    scale: float = 1.0
    equal: float
    explained: float
    rank: int | None = None
    grids: tuple[str, str]
    rounded: Side | None = None
    quantised: bool = False
    coarse: tuple[bool, bool] = (False, False)
    hidden: float = 0.0
    zeroed: float = 0.0

    @property
    def only_scaled(self) -> bool:
        """Whether the two differ by a scale alone."""
        return self.scale != 1 and self.distance < FLOAT32_NOISE


def compare_rows(
    src: np.ndarray, tgt: np.ndarray, from_src: RoundingIntervals, from_tgt: RoundingIntervals
) -> Difference:
    """Compare rows of a weight with their counterparts, number by number.

    `src` and `tgt` are (n, m); the roundings hold the intervals that they may have been rounded from.
    """
    src, tgt = src.astype(np.float64), tgt.astype(np.float64)
    norms = float(np.linalg.norm(src)), float(np.linalg.norm(tgt))
    grids = from_src.grid, from_tgt.grid
    equal = float(np.mean(src == tgt)) if src.size else 1.0
    if equal == 1.0:
        return Difference(change=Change.EQUAL, cosine=1.0, distance=0.0, equal=1.0, explained=1.0, grids=grids)
    if not all(norms):
        return Difference(change=Change.TRAINED, cosine=0.0, distance=1.0, equal=equal, explained=equal, grids=grids)
    zeros = tgt == 0
    if np.mean(zeros & ((src < from_tgt.low) | (src > from_tgt.high))) >= _MIN_ZEROED:
        others = tuple(axis[None] for axis in np.nonzero(tgt))  # a matrix of one row, which has no low rank
        rest = compare_rows(src[others], tgt[others], from_src.at(others), from_tgt.at(others))
        return replace(rest, zeroed=float(np.mean(zeros & (src != 0))))
    cosine = float(np.sum(src * tgt)) / (norms[0] * norms[1])
    scale = _scale(src, tgt, norms)
    src, from_src = scale * src, from_src.times(scale)
    delta = tgt - src
    distance = float(np.linalg.norm(delta)) / (abs(scale) * norms[0])
    found = _explain_by_rounding(src, tgt, from_src, from_tgt)
    finer, coarser = sorted((from_src.width, from_tgt.width))
    # If the target was computed from stored numbers, only its own later rounding is noise; otherwise both are.
    ranks = [_low_rank(delta, noise / np.sqrt(12)) for noise in (finer, float(np.hypot(finer, coarser)))]
    steps = _in_steps(delta, max(from_src, from_tgt, key=lambda side: side.width))
    coarse, one_sided = from_src.coarse or from_tgt.coarse, from_src.coarse != from_tgt.coarse
    wanted = _MIN_EXPLAINED if from_src.declared and from_tgt.declared else _MIN_EXPLAINED_INFERRED
    rank, quantised = None, one_sided and steps >= _MIN_ERROR
    exact = distance < FLOAT32_NOISE and np.abs(delta).max() < 16 * FLOAT32_NOISE * np.abs(tgt).max()
    if exact or found.share >= wanted:
        change, quantised = Change.ROUNDED, not exact and coarse and found.coarse
    elif ranks[0] is not None:
        change, rank, quantised = Change.LOW_RANK, ranks[0], False
    elif ranks[1] is not None:
        change, rank = Change.LOW_RANK, ranks[1]
    elif coarse and steps < 1 and (steps >= _MIN_ERROR or not one_sided):
        change, quantised = Change.TRAINED_OR_ROUNDED, False
    else:
        change = Change.TRAINED
    # Noise of size s crosses the middle between two levels, a step apart, with a chance of 0.8 s / step. Less than half
    # a step of the finer grid is invisible, unless both sides lie on the same levels.
    unseen = (finer / 2 if found.side else 0) + (1 - wanted) / 0.8 * coarser
    return Difference(
        change=change,
        cosine=cosine,
        distance=distance,
        scale=scale,
        equal=equal,
        explained=equal + (1 - equal) * found.share,
        rank=rank,
        grids=grids,
        rounded=found.side,
        quantised=quantised,
        coarse=(_is_coarse(src, from_src), _is_coarse(tgt, from_tgt)),
        hidden=unseen / float(np.sqrt(np.mean(np.square(tgt)))) + HALF_PRECISION * (coarser > 0),
    )


def _is_coarse(numbers: np.ndarray, rounding: RoundingIntervals) -> bool:
    return rounding.coarse and rounding.width > _COARSE_STEP * float(np.sqrt(np.mean(np.square(numbers))))


@dataclass(frozen=True)
class _Explanation:
    """An explanation by rounding: the share of unequal numbers, the rounded side, and whether its grid is coarse."""

    share: float
    side: Side | None
    coarse: bool


def _explain_by_rounding(
    src: np.ndarray, tgt: np.ndarray, from_src: RoundingIntervals, from_tgt: RoundingIntervals
) -> _Explanation:
    """Return the best explanation by rounding that fits the size of the difference.

    Either one side is a rounding of the other's numbers; or, if its steps are much coarser, both are roundings of
    the same numbers; or both lie on the same levels of a block, apart from a later rounding.
    """
    sides: tuple[tuple[Side, RoundingIntervals, RoundingIntervals, np.ndarray], ...] = (
        ("target", from_tgt, from_src, src),
        ("source", from_src, from_tgt, tgt),
    )
    best, unequal = _Explanation(0.0, None, coarse=False), src != tgt
    if not unequal.any():
        return _Explanation(1.0, None, coarse=False)
    for side, own, other, numbers in sides:
        if _in_steps(tgt - src, own) < _MIN_ERROR:
            continue
        inside = (own.low <= numbers) & (numbers <= own.high)
        if own.width >= _COARSER * other.width:
            inside |= (own.low < other.high) & (other.low < own.high)
        # Counted among unequal numbers alone: where few changed, the others are no evidence of rounding.
        share = float(np.mean(inside[unequal]))
        if share > best.share:
            best = _Explanation(share, side, own.coarse)
    if from_src.coarse and from_tgt.coarse and best.share < _MIN_EXPLAINED:
        step = np.minimum(from_src.high - from_src.low, from_tgt.high - from_tgt.low)
        share = float(np.mean((np.abs(tgt - src) <= _SAME_LEVEL * step)[unequal]))
        same_levels = _Explanation(share, None, coarse=from_src.declared and from_tgt.declared)
        best = max(best, same_levels, key=lambda item: item.share)
    return best


def _in_steps(delta: np.ndarray, rounding: RoundingIntervals) -> float:
    """Return the mean size of the non-zero differences in steps of a rounding; infinity if there are none."""
    width = rounding.high - rounding.low
    some = (width > 0) & (delta != 0)
    return float(np.mean(np.abs(delta)[some] / width[some])) if some.any() else np.inf


def _scale(src: np.ndarray, tgt: np.ndarray, norms: tuple[float, float]) -> float:
    """Return the least-squares factor between two matrices, 1 unless it explains most of their difference."""
    scale = float(np.sum(src * tgt)) / norms[0] ** 2
    before, after = (float(np.linalg.norm(tgt - factor * src)) for factor in (1.0, scale))
    return scale if abs(scale - 1) > _MIN_SCALE_CHANGE and after < _MAX_UNSCALED * before else 1.0


def _low_rank(delta: np.ndarray, noise: float) -> int | None:
    """Count the singular values above noise; None if there are many, or if they hold too little of the energy.

    Many means more than half of the changed rows or columns: a few changed numbers are no low-rank update.
    """
    short = min(np.count_nonzero(delta.any(axis=axis)) for axis in (0, 1))
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    energies = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
    edge = _NOISE_EDGE * noise * sum(np.sqrt(delta.shape))
    rank = int(np.count_nonzero(energies > edge**2))
    held = energies[:rank].sum() / energies.sum() if rank else 0.0
    return rank if 0 < rank <= _MAX_RANK_SHARE * short and held >= _MIN_RANK_ENERGY else None
