"""The update of the experts of a layer, beside the updates of linear modules."""

from dataclasses import dataclass

import numpy as np

from jcrosslora.adapter.factors import Array
from jcrosslora.adapter.pytrees import register_change


@register_change(arrays=("a", "b"), account=("share",))
@dataclass(frozen=True, eq=False)
class ExpertUpdate:
    """The update dW[e] = b[e] @ a[e] of one matrix of all E experts of a layer, as a pytree of a and b.

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
    a: Array
    b: Array
    turned: bool = False
    share: float | None = None

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        a, b = np.asarray(self.a), np.asarray(self.b)
        left, right = b.swapaxes(1, 2) @ b, a @ a.swapaxes(1, 2)
        return float(np.sum(left * right, dtype=np.float64))
