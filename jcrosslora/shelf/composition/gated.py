"""AutoLoRA's gate: for each token, module and output number a factor on each adapter's output.

    g_i = sigmoid(LN(y_b) * w_b + LN(y_i) * w_l + LN(y_b) * LN(y_i) * w_c + b),   y = y_b + sum_i w_o * g_i * y_i

y_b is what the module of the base returns, y_i = s_i B_i A_i x what an adapter adds, and all products are by element.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.decoder.ops import layer_norm, linear
from jcrosslora.shelf.composition.composition import Composition, chosen
from jcrosslora.shelf.composition.updates import Arrays, RoleSizes, Updates

EPS = 1e-5  # of both norms, as in AutoLoRA's code


@dataclass(frozen=True)
class Gated(Composition):
    """The gate of AutoLoRA, with the names of its code for the arrays; both norms have a gain and a bias.

    AutoLoRA starts from normal numbers, which is the control `random-gate` here. This starts from zeros and w_o = 2/N:
    every gate is 1/2, and before it is trained the result is the mean of all N adapters' outputs.
    """

    name: ClassVar[str] = "gated"
    reference: ClassVar[str] = "AutoLoRA, arXiv 2508.02107"
    trained: ClassVar[bool] = True

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for adapters with a positive weight; the gate decides how much each adds."""
        return chosen(weights)

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Make a gate that is 1/2 everywhere."""
        del seed
        shape = sizes.layers, sizes.out
        zeros = dict.fromkeys(("weight_base", "weight_lora", "weight_cross", "bias"), jnp.zeros(shape, jnp.float32))
        return zeros | plain_norms(shape) | {"weight_out": jnp.full(shape, 2 / count, jnp.float32)}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the adapters' outputs, each times its gate."""
        own, wide = updates.arrays, x.astype(jnp.float32)
        base = layer_norm(out, own["norm_base.weight"], own["norm_base.bias"], EPS)

        # One adapter after another, and computed again in the backward pass: the outputs of all of them would take N
        # times the memory, and to keep them takes longer.
        @partial(jax.checkpoint, prevent_cse=False)
        def add(total: jax.Array, one: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            a, b, share = one
            added = linear(linear(wide, a), b)
            lora = layer_norm(added, own["norm_lora.weight"], own["norm_lora.bias"], EPS)
            inside = base * own["weight_base"] + lora * own["weight_lora"] + base * lora * own["weight_cross"]
            gate = jax.nn.sigmoid(inside + own["bias"])
            return total + share[:, None, None] * own["weight_out"] * gate * added, None

        each = updates.a, updates.b.swapaxes(0, 1), updates.shares.T
        return lax.scan(add, out, each)[0]


def plain_norms(shape: tuple[int, int]) -> Arrays:
    """Make the gains and biases of both norms, (L, O): 1 and 0."""
    ones, zeros = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    norms = ("norm_base", "norm_lora")
    return {f"{norm}.weight": ones for norm in norms} | {f"{norm}.bias": zeros for norm in norms}
