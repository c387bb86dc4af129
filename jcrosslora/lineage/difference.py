"""What became of one matrix: nothing, a scale, rounding, an update of low rank, or training."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jcrosslora.lineage.rounding import HALF_PRECISION, Rounding

Change = Literal["equal", "rounded", "low rank", "trained or rounded", "trained"]

# Share of numbers whose roundings meet from which rounding is all that happened: rounding to the nearest level leaves
# nearly all of them. The steps of a grid that only shows in the numbers are not known as exactly.
_EXPLAINED, _EXPLAINED_IF_SEEN = 0.998, 0.99
# How much wider the steps of one side have to be for it to be a rounding of the other: bfloat16 has an eighth of the
# steps of float16, and two formats of four bits differ by a tenth.
_COARSER = 1.5
# Errors of rounding are spread evenly over a step, so that they are a quarter of one in the mean; steps at the ends of
# a block are taken for three times as wide, and those of floats twice as wide below a power of two.
_LEAST_ERROR = 0.1
# Levels that were rounded once more moved by less than this share of a step.
_SAME_LEVEL = 0.25
# Float32 has 24 bits: sums of some thousands of products agree that well, whatever their order.
SAME_MATHS = 2.0**-20
# Of a matrix that was scaled, the scale leaves nothing, or less than a tenth of what the difference was.
_SCALED, _BARELY_SCALED = 0.1, 1e-3
# An update of low rank is one whose energy is in a half of the directions or fewer, but for rounding.
_LOW_RANK, _IN_RANK = 0.5, 0.7
# Singular values of noise stay below sigma (sqrt(n) + sqrt(m)), in the limit of large matrices; rounding errors of
# neighbours in a block are not quite independent.
_EDGE = 2.0


@dataclass(frozen=True)
class Difference:
    """A matrix of the target against its counterpart.

    Attributes:
        change: what the difference looks like.
        cosine: of the sampled numbers.
        distance: ||W_tgt - W_src||_F / ||W_src||_F, after the scale was taken off.
        scale: what the source's numbers were multiplied by.
        equal: share of numbers that are equal.
        explained: share of numbers that rounding explains, those that are equal included.
        rank: of an update of low rank, as far as it shows in the sample; else None.
        grids: the formats of the source and the target.
        rounded: which side is a rounding, "source" or "target"; None where it is neither, or that cannot be told.
        quantised: whether one side was quantised to 8 bits or fewer, alone or beside the change.
        hidden: relative size of changes that rounding may hide.
    """

    change: Change
    cosine: float
    distance: float
    scale: float
    equal: float
    explained: float
    rank: int | None
    grids: tuple[str, str]
    rounded: Literal["source", "target"] | None
    quantised: bool
    hidden: float

    @property
    def only_scaled(self) -> bool:
        """Whether nothing but a scale came in between."""
        return self.scale != 1 and self.distance < SAME_MATHS


def compare_rows(src: np.ndarray, tgt: np.ndarray, from_src: Rounding, from_tgt: Rounding) -> Difference:
    """Compare rows of a weight with their counterparts, number by number.

    Args:
        src: (n, m), the source's.
        tgt: (n, m), the target's.
        from_src: what the source's may have been rounded from, of the same shape.
        from_tgt: what the target's may.
    """
    src, tgt = src.astype(np.float64), tgt.astype(np.float64)
    norms = float(np.linalg.norm(src)), float(np.linalg.norm(tgt))
    grids = from_src.grid, from_tgt.grid
    equal = float(np.mean(src == tgt)) if src.size else 1.0
    if equal == 1.0:
        return Difference("equal", 1.0, 0.0, 1.0, 1.0, 1.0, None, grids, None, quantised=False, hidden=0.0)
    if not (norms[0] and norms[1]):
        return Difference("trained", 0.0, 1.0, 1.0, equal, equal, None, grids, None, quantised=False, hidden=0.0)
    cosine = float(np.sum(src * tgt)) / (norms[0] * norms[1])
    scale = _scale(src, tgt, norms)
    src, from_src = scale * src, _times(from_src, scale)
    delta = tgt - src
    distance = float(np.linalg.norm(delta)) / (abs(scale) * norms[0])
    found = _rounded(src, tgt, from_src, from_tgt)
    widths = sorted((from_src.width, from_tgt.width))
    # What was made of stored numbers shows only the rounding that came after; else that of both.
    ranks = [_low_rank(delta, noise / np.sqrt(12)) for noise in (widths[0], float(np.hypot(widths[0], widths[1])))]
    steps = _in_steps(delta, max(from_src, from_tgt, key=lambda side: side.width))
    one_sided = from_src.coarse != from_tgt.coarse
    asked = _EXPLAINED if from_src.declared and from_tgt.declared else _EXPLAINED_IF_SEEN
    rank, quantised = None, False
    exact = distance < SAME_MATHS and np.abs(delta).max() < 16 * SAME_MATHS * np.abs(tgt).max()
    if exact or found.share >= asked:
        change: Change = "rounded"
        quantised = not exact and (from_src.coarse or from_tgt.coarse) and found.coarse
    elif ranks[0] is not None:
        change, rank = "low rank", ranks[0]
    elif ranks[1] is not None:
        change, rank, quantised = "low rank", ranks[1], one_sided and steps >= _LEAST_ERROR
    elif (from_src.coarse or from_tgt.coarse) and steps < 1 and (steps >= _LEAST_ERROR or not one_sided):
        change = "trained or rounded"
    else:
        change, quantised = "trained", one_sided and steps >= _LEAST_ERROR
    # Noise of size s crosses the middle between two levels, a step apart, with a chance of 0.8 s / step; what is less
    # than half a step of the finer grid is not seen at all, unless both sides are on the same levels.
    unseen = (widths[0] / 2 if found.side else 0) + (1 - asked) / 0.8 * widths[1]
    hidden = unseen / _size(tgt) + HALF_PRECISION * (widths[1] > 0)
    explained = equal + (1 - equal) * found.share
    return Difference(change, cosine, distance, scale, equal, explained, rank, grids, found.side, quantised, hidden)


@dataclass(frozen=True)
class _Rounded:
    """How far rounding explains a difference: the share of unequal numbers, the side, and if its grid is coarse."""

    share: float
    side: Literal["source", "target"] | None
    coarse: bool


def _rounded(src: np.ndarray, tgt: np.ndarray, from_src: Rounding, from_tgt: Rounding) -> _Rounded:
    """The best of the explanations by rounding that fit the size of the difference.

    One side is a rounding of the other's numbers; or, where its steps are much coarser, both are of the same numbers;
    or both lie on the same levels of a block, but for a later rounding of these.
    """
    sides: tuple[tuple[Literal["source", "target"], Rounding, Rounding, np.ndarray], ...] = (
        ("target", from_tgt, from_src, src),
        ("source", from_src, from_tgt, tgt),
    )
    best, unequal = _Rounded(0.0, None, coarse=False), src != tgt
    if not unequal.any():
        return _Rounded(1.0, None, coarse=False)
    for side, own, other, numbers in sides:
        if _in_steps(tgt - src, own) < _LEAST_ERROR:
            continue
        inside = (own.low <= numbers) & (numbers <= own.high)
        if own.width >= _COARSER * other.width:
            inside |= (own.low < other.high) & (other.low < own.high)
        # Where few numbers changed, the others say nothing for rounding.
        share = float(np.mean(inside[unequal]))
        if share > best.share:
            best = _Rounded(share, side, own.coarse)
    if from_src.coarse and from_tgt.coarse and best.share < _EXPLAINED:
        step = np.minimum(from_src.high - from_src.low, from_tgt.high - from_tgt.low)
        share = float(np.mean((np.abs(tgt - src) <= _SAME_LEVEL * step)[unequal]))
        best = max(
            best, _Rounded(share, None, coarse=from_src.declared and from_tgt.declared), key=lambda item: item.share
        )
    return best


def _times(rounding: Rounding, scale: float) -> Rounding:
    ends = rounding.low * scale, rounding.high * scale
    return replace(rounding, low=np.minimum(*ends), high=np.maximum(*ends))


def _in_steps(delta: np.ndarray, rounding: Rounding) -> float:
    """Mean size of a difference in steps of a rounding, where there is any."""
    width = rounding.high - rounding.low
    some = (width > 0) & (delta != 0)
    return float(np.mean(np.abs(delta)[some] / width[some])) if some.any() else np.inf


def _size(numbers: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(numbers))))


def _scale(src: np.ndarray, tgt: np.ndarray, norms: tuple[float, float]) -> float:
    """The factor between two matrices, 1 unless it explains most of their difference."""
    scale = float(np.sum(src * tgt)) / norms[0] ** 2
    before, after = (float(np.linalg.norm(tgt - factor * src)) for factor in (1.0, scale))
    return scale if abs(scale - 1) > _BARELY_SCALED and after < _SCALED * before else 1.0


def _low_rank(delta: np.ndarray, noise: float) -> int | None:
    """How many singular values stand out of the noise; None if they are many, or do not hold what there is."""
    short = min(delta.shape)
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    energies = np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)
    edge = _EDGE * noise * sum(np.sqrt(delta.shape))
    rank = int(np.count_nonzero(energies > edge**2))
    held = energies[:rank].sum() / energies.sum() if rank else 0.0
    return rank if 0 < rank <= _LOW_RANK * short and held >= _IN_RANK else None
