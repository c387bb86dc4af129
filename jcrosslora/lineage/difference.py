"""What became of one matrix: nothing, a scale, rounding, an update of low rank, or training."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jcrosslora.lineage.rounding import HALF_PRECISION, Rounding

Change = Literal["equal", "rounded", "low rank", "trained or rounded", "trained"]

# Share of numbers whose roundings meet from which rounding is all that happened: rounding to the nearest level leaves
# nearly all of them.
_EXPLAINED = 0.998
# How much wider the steps of one side have to be for it to be a rounding of the other: bfloat16 has an eighth of the
# steps of float16, and two formats of four bits differ by a tenth.
_COARSER = 1.5
# Float32 has 24 bits: sums of some thousands of products agree that well, whatever their order.
SAME_MATHS = 2.0**-20
# Of a matrix that was scaled, the scale leaves nothing, or less than a tenth of what the difference was.
_SCALED, _BARELY_SCALED = 0.1, 1e-3
# An update of low rank is one whose energy is in a half of the directions or fewer, but for rounding.
_LOW_RANK, _IN_RANK = 0.5, 0.7
# Singular values of noise stay below sigma (sqrt(n) + sqrt(m)), in the limit of large matrices; rounding errors of
# neighbours in a block are not quite independent.
_EDGE = 1.5


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
        rounded: which side has the coarser steps, "source" or "target"; None where both are alike.
        quantised: whether the source and the target lie on a grid of 8 bits or fewer.
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
    quantised: tuple[bool, bool]
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
    grids, quantised = (from_src.grid, from_tgt.grid), (from_src.coarse, from_tgt.coarse)
    equal = float(np.mean(src == tgt)) if src.size else 1.0
    if equal == 1.0:
        return Difference("equal", 1.0, 0.0, 1.0, 1.0, 1.0, None, grids, None, quantised, 0.0)
    if not (norms[0] and norms[1]):
        return Difference("trained", 0.0, 1.0, 1.0, equal, equal, None, grids, None, quantised, 0.0)
    cosine = float(np.sum(src * tgt)) / (norms[0] * norms[1])
    scale = _scale(src, tgt, norms)
    ends = from_src.low * scale, from_src.high * scale
    low, high, source_width = np.minimum(*ends), np.maximum(*ends), abs(scale) * from_src.width
    delta = tgt - scale * src
    distance = float(np.linalg.norm(delta)) / (abs(scale) * norms[0])
    widths = sorted((source_width, from_tgt.width))
    rounds = widths[1] >= _COARSER * widths[0]
    # Of two numbers on grids alike, one is no rounding of the other.
    explained = float(np.mean((low < from_tgt.high) & (from_tgt.low < high))) if rounds else equal
    # Noise of size s crosses the middle between two levels, a step apart, with a chance of 0.8 s / step; what is less
    # than half a step of the finer grid is not seen at all.
    size = norms[1] / np.sqrt(tgt.size)
    hidden = (widths[0] / 2 + (1 - _EXPLAINED) / 0.8 * widths[1]) / size + HALF_PRECISION * (widths[1] > 0)
    rank = None
    if distance < SAME_MATHS or (rounds and explained >= _EXPLAINED):
        change: Change = "rounded"
    elif (rank := _low_rank(delta, np.hypot(*widths) / np.sqrt(12))) is not None:
        change = "low rank"
    elif (from_src.coarse or from_tgt.coarse) and distance * size < widths[1]:
        change = "trained or rounded"
    else:
        change = "trained"
    side = ("target" if from_tgt.width > source_width else "source") if rounds else None
    return Difference(change, cosine, distance, scale, equal, explained, rank, grids, side, quantised, hidden)


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
