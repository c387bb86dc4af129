"""Intervals of means over questions by the bootstrap: percentiles over resampled questions.

B. Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from jcrosslora.errors import UsageError

LOWER_IS_BETTER = ("nll_per_char", "nll_pooled")
_PERCENTILES = (2.5, 97.5)
FEWEST = 8  # questions to call a difference better or worse
_NUMBERS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def excludes(self, number: float) -> bool:
        """Check whether a number lies outside the interval."""
        return not self.low <= number <= self.high


class Direction(StrEnum):
    """The meaning of a difference to the base, as the word that is printed."""

    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "unclear"


def word_of(figure: str, difference: Interval, questions: int) -> Direction:
    """Name a difference to the base; it is unclear if its interval includes 0 or it has fewer than 8 questions.

    Resamples of a few questions differ too little: the interval of a single one has no width.
    """
    if questions < FEWEST or not difference.excludes(0):
        return Direction.UNCLEAR
    return Direction.BETTER if (difference.value < 0) == (figure in LOWER_IS_BETTER) else Direction.WORSE


class Evaluated(ABC):
    """Figures of n questions under A models, the base first, with 95% intervals over resampled questions."""

    @property
    @abstractmethod
    def figures(self) -> tuple[str, ...]:
        """The names of the figures that apply."""

    @abstractmethod
    def values(self, figure: str) -> np.ndarray:
        """Return a figure of each question as float64 (A, n).

        Raises:
            UsageError: an unknown figure.
        """

    def bootstrap(self, figure: str, *, draws: int = 10_000, seed: int = 0) -> list[Interval]:
        """Compute the mean of a figure under each model with its interval."""
        return intervals(self.values(figure), draws=draws, seed=seed)

    def differences(self, figure: str, *, draws: int = 10_000, seed: int = 0) -> list[Interval]:
        """Compute each model's figure minus the base's with its interval, over the same resampled questions."""
        values = self.values(figure)
        return intervals(values - values[:1], draws=draws, seed=seed)

    def lift(self, figure: str, moved: int, trained: int, *, draws: int = 10_000, seed: int = 0) -> Interval:
        """Compute the share of a trained adapter's gain that a moved one recovers (see `lift_recovered`).

        `moved` and `trained` are indices of models, 1 or more.

        Raises:
            UsageError: no such model, an unknown figure, or a gain of the trained adapter whose interval is not
                above 0.
        """
        values = self.values(figure)
        for place in (moved, trained):
            if not 1 <= place < len(values):
                raise UsageError(f"model {place} of {len(values)}: expected the place of an adapter, counted from 1")
        base, own, oracle = (values if figure in LOWER_IS_BETTER else -values)[[0, moved, trained]]
        return lift_recovered(base, own, oracle, draws=draws, seed=seed)


def bootstrap_means(values: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Compute means over resampled questions, float64 (A, draws), with the same resamples in every row.

    Values are (A, n), a figure of n questions under A models. The same seed and n give the same resamples.

    Raises:
        UsageError: no draws, no questions, or values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if draws < 1 or values.ndim != 2 or values.shape[1] < 1 or not np.isfinite(values).all():
        came = f"bootstrap of values {list(values.shape)} with {draws} draws"
        raise UsageError(f"{came}: expected finite values (models, questions) and 1 draw or more")
    count = values.shape[1]
    rng, share = np.random.default_rng(seed), np.full(count, 1 / count)
    size = max(1, _NUMBERS_AT_ONCE // count)
    pieces = [
        rng.multinomial(count, share, min(size, draws - start)) @ values.T / count for start in range(0, draws, size)
    ]
    return np.concatenate(pieces).T


def intervals(values: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> list[Interval]:
    """Compute the mean of each row of (A, n) with its interval."""
    means = bootstrap_means(values, draws=draws, seed=seed)
    return [_interval(float(row.mean()), found) for row, found in zip(np.asarray(values), means, strict=True)]


def ratios(
    parts: np.ndarray, wholes: np.ndarray, *, minus_first: bool = False, draws: int = 10_000, seed: int = 0
) -> list[Interval]:
    """Compute sum(parts) / sum(wholes) of each row of (A, n) with its interval; `minus_first` subtracts the first."""
    found = parts.sum(axis=1) / wholes.sum(axis=1)
    drawn = np.divide(*np.split(bootstrap_means(np.concatenate([parts, wholes]), draws=draws, seed=seed), 2))
    if minus_first:
        found, drawn = found - found[0], drawn - drawn[0]
    return [_interval(float(value), row) for value, row in zip(found, drawn, strict=True)]


def lift_recovered(
    base: np.ndarray, moved: np.ndarray, trained: np.ndarray, *, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Compute the share of a trained adapter's gain that a moved one recovers: (base - moved) / (base - trained).

    Each mean is over questions; the interval is over the same resampled questions in all three.

    Each figure is (n,), e.g. `Scores.by_question("nll_per_char")[0]`: under the target base, with the moved adapter,
    and with an adapter trained on the target.

    Raises:
        UsageError: figures of different questions, or a gain of the trained adapter whose interval is not above 0.
    """
    shapes = [np.shape(each) for each in (base, moved, trained)]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise UsageError(
            f"lift of figures {', '.join(str(list(one)) for one in shapes)}: expected the same questions (n,) in each"
        )
    gains = np.stack([np.subtract(base, moved), np.subtract(base, trained)]).astype(np.float64)
    means = bootstrap_means(gains, draws=draws, seed=seed)
    trained_gain = _interval(float(gains[1].mean()), means[1])
    if not trained_gain.low > 0:
        came = f"{trained_gain.value:.4g} [{trained_gain.low:.4g}, {trained_gain.high:.4g}]"
        msg = (
            f"the trained adapter gains {came} over the base, expected an interval above 0: train it more, or use more "
        )
        msg += "questions"
        raise UsageError(msg)
    # Fewer than 2.5% of the draws have a negative trained gain, and they stay. A draw without any gain, as figures of 0
    # and 1 can give, has no share.
    some = means[1] != 0
    return _interval(float(gains[0].mean() / gains[1].mean()), means[0, some] / means[1, some])


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, _PERCENTILES)
    return Interval(value, float(low), float(high))
