"""What a search finds, what searches, and thresholds without labels.

The threshold of an adapter is the score that 95% of its samples exceed; each sample is compared with the adapter as if
it were not one of its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jcrosslora.errors import UsageError
from jcrosslora.text import Prompt

_MISSED = 0.05  # share of an adapter's samples below its threshold
_ENOUGH = 8  # samples from which an adapter gets a threshold; with fewer it takes that of the whole shelf


@dataclass(frozen=True, eq=False)
class Retrieved:
    """The adapters of a shelf for P prompts; a `count` below 1 raises UsageError.

    Attributes:
        names: of all N adapters.
        scores: float32 (P, N), how well each suits; -inf if nothing is known of an adapter.
        thresholds: float32 (N,), the least score of a prompt that counts as one of the adapter's task.
    """

    names: tuple[str, ...]
    scores: np.ndarray
    thresholds: np.ndarray

    @property
    def accepted(self) -> np.ndarray:
        """Whether a prompt counts as one of an adapter's task, bool (P, N)."""
        return np.isfinite(self.scores) & (self.scores >= self.thresholds)

    def ranked(self, count: int = 1) -> np.ndarray:
        """Return int (P, min(count, N)): the adapters with the best scores, the best first, accepted or not."""
        return _best(self.scores, count)

    def best(self, count: int = 1) -> list[list[tuple[str, float]]]:
        """Return for each prompt the names and scores of at most `count` accepted adapters, the best first.

        A prompt of no adapter's task has none: the base alone should answer it.
        """
        accepted = self.accepted
        return [
            [(self.names[number], float(self.scores[row, number])) for number in numbers if accepted[row, number]]
            for row, numbers in enumerate(_best(np.where(accepted, self.scores, -np.inf), count))
        ]

    def weights(self, count: int = 1) -> np.ndarray:
        """Return float32 (P, N): equal weights, of sum 1, on the best `count` accepted adapters of each prompt.

        A row of zeros stands for the base alone.
        """
        found, accepted = np.zeros(self.scores.shape, np.float32), self.accepted
        best = _best(np.where(accepted, self.scores, -np.inf), count)
        np.put_along_axis(found, best, np.float32(1), axis=1)
        found *= accepted
        return found / np.maximum(found.sum(axis=1, keepdims=True), 1)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    if count < 1:
        msg = f"{count} adapters were asked for; wanted 1 or more"
        raise UsageError(msg)
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


class Retriever(Protocol):
    """Finds adapters for prompts."""

    thresholds: np.ndarray  # float32 (N,), see `Retrieved`

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return float32 (P, N), see `Retrieved`."""
        ...


def similarity_to_others(products: np.ndarray, squares: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Compute the cosine of each of m vectors x with the sum of the m - 1 others.

    The arguments are scalar products with the sum M of all: `products` (m,) x M, `squares` (m,) x x, `total` M M.
    """
    products, squares = np.asarray(products, np.float64), np.asarray(squares, np.float64)
    others = np.maximum(total - 2 * products + squares, 0)
    size = np.sqrt(squares * others)
    return np.divide(products - squares, size, out=np.zeros_like(size), where=size > 0)


def thresholds_of(similarities: Sequence[np.ndarray]) -> np.ndarray:
    """Choose the thresholds, float32 (N,), by the similarities of each adapter's samples.

    Infinity accepts nothing, and stands where neither the adapter nor the shelf has samples to tell from.
    """
    pooled = np.concatenate([np.zeros(0), *similarities])
    common = np.quantile(pooled, _MISSED) if len(pooled) else np.inf
    found = [np.quantile(each, _MISSED) if len(each) >= _ENOUGH else common for each in similarities]
    return np.array(found, np.float32)
