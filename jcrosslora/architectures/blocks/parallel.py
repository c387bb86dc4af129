"""Mixers that read the same normed stream, and whose outputs are added, as attention and Mamba 2 in Falcon-H1."""

from dataclasses import dataclass
from typing import Any

import jax

from jcrosslora.architectures.blocks.block import Block, Norm, Tensor
from jcrosslora.architectures.cache import KVCache
from jcrosslora.architectures.run import Run


@dataclass(frozen=True)
class Parallel(Block):
    """Two mixers side by side.

    Attributes:
        first: whose output comes first in the sum.
        second: the other; the two have no role and no state in common.
    """

    first: Block
    second: Block

    @property
    def rotated_size(self) -> int | None:
        """That of the one that has positions."""
        return self.first.rotated_size or self.second.rotated_size

    @property
    def mixed_size(self) -> int:
        """The larger of both."""
        return max(self.first.mixed_size, self.second.mixed_size)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I) of both."""
        return self.first.shapes() | self.second.shapes()

    def norms(self) -> dict[str, Norm]:
        """Return the norms inside both."""
        return self.first.norms() | self.second.norms()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of both."""
        return self.first.tensors() | self.second.tensors()

    def states(self, batch: int, length: int, dtype: Any) -> dict[str, Any]:
        """Return the form of what both keep."""
        return self.first.states(batch, length, dtype) | self.second.states(batch, length, dtype)

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run both; see `Block.forward`."""
        first, cache = self.first.forward(run, x, cache)
        second, cache = self.second.forward(run, x, cache)
        return first + second, cache
