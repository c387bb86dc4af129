"""Generate text with several adapters at once, each prompt with its own shares of them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from jcrosslora.decoder import Generator
from jcrosslora.shelf.composition.updates import ComposedAdapter


@dataclass(frozen=True, eq=False)
class ComposedGenerator(Generator):
    """A base that writes with composed adapters.

    Attributes:
        shares: float32 (P, N), of the P prompts that `write` is called with, in their order.
    """

    shares: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def _for(self, places: Sequence[int], rows: int) -> Self:
        assert isinstance(self.adapter, ComposedAdapter)
        batch = np.zeros((rows, self.shares.shape[1]), np.float32)
        batch[: len(places)] = self.shares[list(places)]
        return dataclasses.replace(self, adapter=self.adapter.with_shares(batch))

    @property
    def shares_beginnings(self) -> bool:
        """False: a beginning that is read once has no shares, as each of its prompts has its own."""
        return False
