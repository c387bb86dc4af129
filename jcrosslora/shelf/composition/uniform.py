"""A control: the mean of the outputs in equal parts, whatever the weights."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from jcrosslora.shelf.composition.composition import chosen
from jcrosslora.shelf.composition.mixture import Mixture


@dataclass(frozen=True)
class Uniform(Mixture):
    """The mixture of all adapters with a positive weight, in equal parts: what a gate has to be better than."""

    name: ClassVar[str] = "uniform"
    reference: ClassVar[str] = "control"

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return equal shares of the adapters with a positive weight."""
        return super().shares(chosen(weights))
