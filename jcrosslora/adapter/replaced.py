"""Tensors of an adapter that replace those of its own base: trained biases, norms, and whole linear layers.

They have no low rank and do not move to another base; on their own base they are exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ReplacedTensors:
    """New tensors of the base of one kind of change. Compared by value.

    Attributes:
        kind: the tensors that they were read from: "full", "bias" or "lora_bias" of `ignored.CHANGES`.
        tensors: the base's name of each tensor to its new values, of the base's shape.
        share: of the whole adapter's squared Frobenius norm that the change has; None if it is not known.
    """

    kind: str
    tensors: Mapping[str, np.ndarray]
    share: float | None = None

    def __eq__(self, other: object) -> bool:
        """Compare by value, so that an adapter is a pytree with comparable static parts."""
        return (
            isinstance(other, ReplacedTensors)
            and self._figures == other._figures
            and all(np.array_equal(array, other.tensors[name]) for name, array in self.tensors.items())
        )

    def __hash__(self) -> int:
        """Hash names and figures alone."""
        return hash(self._figures)

    @property
    def _figures(self) -> tuple:
        return self.kind, frozenset(self.tensors), self.share

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that change."""
        return tuple(name.rpartition(".")[0] for name in self.tensors)
