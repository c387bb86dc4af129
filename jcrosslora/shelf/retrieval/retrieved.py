"""What a search found, and the interface of what searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from jcrosslora.errors import UsageError
from jcrosslora.text import Prompt


@dataclass(frozen=True, eq=False)
class Retrieved:
    """The adapters of a shelf for P prompts.

    Attributes:
        names: of all N adapters.
        scores: float32 (P, N), how well each suits; -inf where nothing is known of an adapter.
        thresholds: float32 (N,), the score from which on a prompt counts as one of the adapter's task.
    """

    names: tuple[str, ...]
    scores: np.ndarray
    thresholds: np.ndarray

    @property
    def accepted(self) -> np.ndarray:
        """Return bool (P, N): whether a prompt counts as one of an adapter's task."""
        return np.isfinite(self.scores) & (self.scores >= self.thresholds)

    def ranked(self, count: int = 1) -> np.ndarray:
        """Return int (P, min(count, N)): the adapters with the best scores, the best first, accepted or not.

        Raises:
            UsageError: the count is below 1.
        """
        return _best(self.scores, count)

    def best(self, count: int = 1) -> list[list[tuple[str, float]]]:
        """Return for each prompt the names and scores of at most `count` accepted adapters, the best first.

        A prompt of no adapter's task has none: the base alone should answer it.

        Raises:
            UsageError: the count is below 1.
        """
        accepted = self.accepted
        return [
            [(self.names[place], float(self.scores[row, place])) for place in places if accepted[row, place]]
            for row, places in enumerate(_best(np.where(accepted, self.scores, -np.inf), count))
        ]

    def weights(self, count: int = 1) -> np.ndarray:
        """Return float32 (P, N): equal weights, of sum 1, on the best `count` accepted adapters of each prompt.

        A row of zeros stands for the base alone.

        Raises:
            UsageError: the count is below 1.
        """
        found, accepted = np.zeros(self.scores.shape, np.float32), self.accepted
        places = _best(np.where(accepted, self.scores, -np.inf), count)
        np.put_along_axis(found, places, np.float32(1), axis=1)
        found *= accepted
        return found / np.maximum(found.sum(axis=1, keepdims=True), 1)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    if count < 1:
        msg = f"{count} adapters were asked for; wanted 1 or more"
        raise UsageError(msg)
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


class Retriever(Protocol):
    """Finds adapters for prompts."""

    name: ClassVar[str]
    thresholds: np.ndarray  # float32 (N,), see `Retrieved`

    def scores(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return float32 (P, N), see `Retrieved`."""
        ...
