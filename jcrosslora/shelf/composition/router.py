"""RAMoLE's router: for each token and module, attention over the adapters' outputs.

    alpha_i = softmax_i(q' v_i / sqrt(O)),   q = B_r A_r x,   v_i = s_i B_i A_i x,   y = y_b + sum_i alpha_i v_i

with a LoRA (A_r, B_r) of the router's own in every module that an adapter updates.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder.ops import einsum, linear
from jcrosslora.errors import UsageError
from jcrosslora.shelf.composition.composition import Composition, chosen
from jcrosslora.shelf.composition.updates import Arrays, RoleSizes, Updates, read_all, write_all

_FAR = -1e30  # a score whose softmax is zero, and without NaN where it is the only one


@dataclass(frozen=True)
class Router(Composition):
    """Attention of a trained RouterLoRA over the adapters, by token; before it is trained it is their mean."""

    name: ClassVar[str] = "router"
    reference: ClassVar[str] = "RAMoLE, arXiv 2406.16989"
    trained: ClassVar[bool] = True

    rank: int = 8
    """Rank of the RouterLoRA."""

    def __post_init__(self) -> None:
        """Check the rank.

        Raises:
            UsageError: it is below 1.
        """
        if self.rank < 1:
            msg = f"a router of rank {self.rank}: wanted 1 or more"
            raise UsageError(msg)

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for adapters with a positive weight, among which the router chooses."""
        return chosen(weights)

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Draw A_r uniformly in +-1/sqrt(I) and set B_r to zero, as LoRA does."""
        del count
        bound = sizes.inputs**-0.5
        drawn = np.random.default_rng(seed).uniform(-bound, bound, (sizes.layers, self.rank, sizes.inputs))
        b = jnp.zeros((sizes.layers, sizes.out, self.rank), jnp.float32)
        return {"lora_A.weight": jnp.asarray(drawn.astype(np.float32)), "lora_B.weight": b}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the adapters' outputs, each times its share of the attention."""
        inner = read_all(x, updates.a)
        query = linear(linear(x.astype(jnp.float32), updates.arrays["lora_A.weight"]), updates.arrays["lora_B.weight"])
        # q' B_i is K wide, and q' v_i needs no output of an adapter.
        scores = jnp.sum(einsum("bto,onk->btnk", query, updates.b) * inner, axis=-1) * len(updates.b) ** -0.5
        shares = updates.shares[:, None, :]
        alpha = jax.nn.softmax(jnp.where(shares > 0, scores, _FAR), axis=-1) * shares
        return out + write_all(inner * alpha[..., None], updates.b)
