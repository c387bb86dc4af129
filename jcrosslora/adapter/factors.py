"""The factors of one LoRA update, as a pytree, and the norm of their product."""

import math

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class LoRAFactors:
    """The update of one linear module with weight W of shape (O, I): dW = scale * b @ a.

    A stack of N adapters (see `stack_adapters`) has a leading axis N on `a` and `b`.

    Attributes:
        a: (K, I), reads the input of the module.
        b: (O, K), writes its output.
        scale: a Python float: alpha / r, or alpha / sqrt(r) for rsLoRA. Static, not a leaf.
    """

    a: Array
    b: Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def rank(self) -> int:
        """K, the number of rows of `a`."""
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), the shape of the weight that the update is for."""
        return self.b.shape[-2], self.a.shape[-1]


def update_norm(factors: LoRAFactors) -> float:
    """Compute ||scale B A||_F in float64 from the K x K Gram matrices: ||B A||^2 = sum(B'B * AA').

    The product is never formed. A stack gives the norm of all its updates together.
    """
    a, b = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b))
    # Rounding can leave a product of factors that cancel just below zero.
    squared = float(np.sum((b.swapaxes(-1, -2) @ b) * (a @ a.swapaxes(-1, -2))))
    return abs(factors.scale) * math.sqrt(max(0.0, squared))
