"""One adapter a prompt: that of the largest weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.shelf.composition.composition import Composition


@dataclass(frozen=True)
class Select(Composition):
    """Each prompt runs with the one adapter that has its largest weight, the first of equal ones."""

    name: ClassVar[str] = "select"
    reference: ClassVar[str] = "LoraRetriever, arXiv 2402.09997"
    needs_weights: ClassVar[bool] = True

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for the adapter of the largest weight."""
        found = np.zeros_like(weights)
        rows = np.arange(len(weights))
        largest = weights.argmax(axis=1)
        found[rows, largest] = weights[rows, largest] > 0
        return found

    def as_adapter(
        self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: Mapping[str, np.ndarray]
    ) -> Adapter:
        """Return the chosen adapter as it is."""
        del arrays
        return adapters[int(np.argmax(shares))]
