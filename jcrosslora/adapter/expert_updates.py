"""The update of the experts of a layer, beside the updates of linear modules."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ExpertUpdate:
    """The update dW[e] = b[e] @ a[e] of one matrix of all E experts of a layer. Compared by value.

    Attributes:
        name: of the parameter in the class of its base, e.g. "model.layers.0.mlp.experts.gate_up_proj".
        layer: index of the layer.
        matrix: "gate_up", whose rows are in the order of the class, or "down".
        a: float32 (E, K, I).
        b: float32 (E, O, K), with the scale.
        turned: whether files of peft hold the factors of its transpose, see `Experts.turned`.
        share: of the whole adapter's squared Frobenius norm.
    """

    name: str
    layer: int
    matrix: str
    a: np.ndarray
    b: np.ndarray
    turned: bool = False
    share: float | None = None

    def __eq__(self, other: object) -> bool:
        """Compare by value, so that an adapter is a pytree with comparable static parts."""
        return (
            isinstance(other, ExpertUpdate)
            and self.name == other.name
            and np.array_equal(self.a, other.a)
            and np.array_equal(self.b, other.b)
        )

    def __hash__(self) -> int:
        """Hash the name and the shapes alone."""
        return hash((self.name, self.a.shape, self.b.shape))

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        left, right = self.b.swapaxes(1, 2) @ self.b, self.a @ self.a.swapaxes(1, 2)
        return float(np.sum(left * right, dtype=np.float64))
