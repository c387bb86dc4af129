"""What a piece of work takes, as counted where it is done; the session makes seconds of it."""

from __future__ import annotations

from dataclasses import dataclass

TEXT = 64  # tokens of a text whose length is not known beforehand


@dataclass(frozen=True)
class Cost:
    """Counts of what takes time; costs of works that follow each other are added.

    Attributes:
        texts: that are written, as progress bars count them.
        written: tokens that the source writes one after the other, each for a whole batch of texts.
        source: tokens that the source reads.
        target: tokens that the target reads.
        predicted: tokens of the source and of the target whose predictions over the whole vocabulary are made.
        stepped: tokens of gradient steps of the target.
        decomposed: matrices of which a truncated SVD is made: shape, rank, and whether single vectors matter.
        svd: O I min(O, I) of the matrices of which a full SVD is made, added up.
        precise: whether what is read is read in float32.
        budget: seconds that this work and the one before it take, if what is counted does not take longer.
    """

    texts: int = 0
    written: float = 0.0
    source: float = 0.0
    target: float = 0.0
    predicted: tuple[float, float] = (0.0, 0.0)
    stepped: float = 0.0
    decomposed: tuple[tuple[tuple[int, int], int, bool], ...] = ()
    svd: float = 0.0
    precise: bool = False
    budget: float | None = None

    def __add__(self, other: Cost) -> Cost:
        """Add the counts; a budget is of one work and not added."""
        return Cost(
            self.texts + other.texts,
            self.written + other.written,
            self.source + other.source,
            self.target + other.target,
            (self.predicted[0] + other.predicted[0], self.predicted[1] + other.predicted[1]),
            self.stepped + other.stepped,
            self.decomposed + other.decomposed,
            self.svd + other.svd,
            self.precise or other.precise,
        )

    @property
    def runs_bases(self) -> bool:
        """Whether a base runs, whose programs have to be compiled."""
        return bool(self.written or self.source or self.target or self.stepped)
