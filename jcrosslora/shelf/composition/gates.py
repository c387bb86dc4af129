"""Ways of composing that decide by token how much each adapter adds: AutoLoRA's gate and RAMoLE's router."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.ops import einsum, layer_norm, linear
from jcrosslora.errors import UsageError
from jcrosslora.shelf.composition.composition import Arrays, Composition, RoleSizes, Updates, read_all, write_all

EPS = 1e-5  # of both norms, as in AutoLoRA's code
_FAR = -1e30  # a score whose softmax is zero, and without NaN if it is the only one


def chosen(weights: np.ndarray) -> np.ndarray:
    """Return 1 where a weight is positive, else 0: float32 of the same shape."""
    return (weights > 0).astype(np.float32)


@dataclass(frozen=True)
class Learned(Composition):
    """A composition whose trained arrays decide how much each adapter with a positive weight adds."""

    trained: ClassVar[bool] = True

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for adapters with a positive weight."""
        return chosen(weights)


@dataclass(frozen=True)
class Gated(Learned):
    """AutoLoRA's gate: for each token, module and output number a factor on each adapter's output.

        g_i = sigmoid(LN(y_b) * w_b + LN(y_i) * w_l + LN(y_b) * LN(y_i) * w_c + b),   y = y_b + sum_i w_o * g_i * y_i

    y_b is the module's output in the base, y_i = s_i B_i A_i x is what an adapter adds, and all products are by
    element. The arrays have the names of AutoLoRA's code; both norms have a gain and a bias.

    AutoLoRA starts from normal numbers, which is the control `random-gate` here. This starts from zeros and w_o = 2/N:
    every gate is 1/2, and before it is trained the result is the mean of all N adapters' outputs.
    """

    name: ClassVar[str] = "gated"
    reference: ClassVar[str] = "AutoLoRA, arXiv 2508.02107"

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Make a gate that is 1/2 everywhere."""
        del seed
        shape = sizes.layers, sizes.out
        zeros = dict.fromkeys(("weight_base", "weight_lora", "weight_cross", "bias"), jnp.zeros(shape, jnp.float32))
        return zeros | _plain_norms(shape) | {"weight_out": jnp.full(shape, 2 / count, jnp.float32)}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the adapters' outputs, each times its gate."""
        arrays, wide = updates.arrays, x.astype(jnp.float32)
        base = layer_norm(out, arrays["norm_base.weight"], arrays["norm_base.bias"], EPS)

        # One adapter after another, and computed again in the backward pass: the outputs of all of them would take N
        # times the memory, and to keep them takes longer.
        @partial(jax.checkpoint, prevent_cse=False)
        def add(total: jax.Array, one: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            a, b, share = one
            added = linear(linear(wide, a), b)
            lora = layer_norm(added, arrays["norm_lora.weight"], arrays["norm_lora.bias"], EPS)
            inside = base * arrays["weight_base"] + lora * arrays["weight_lora"] + base * lora * arrays["weight_cross"]
            gate = jax.nn.sigmoid(inside + arrays["bias"])
            return total + share[:, None, None] * arrays["weight_out"] * gate * added, None

        each = updates.a, updates.b.swapaxes(0, 1), updates.shares.T
        return lax.scan(add, out, each)[0]


@dataclass(frozen=True)
class RandomGate(Gated):
    """A control: the gate with the numbers that AutoLoRA draws before training, and no training."""

    name: ClassVar[str] = "random-gate"
    reference: ClassVar[str] = "control"
    trained: ClassVar[bool] = False

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Draw the weights and the bias of the gate from a normal distribution; w_o is 1."""
        del count
        rng, shape = np.random.default_rng(seed), (sizes.layers, sizes.out)
        names = "weight_base", "weight_lora", "weight_cross", "bias"
        drawn = {name: jnp.asarray(rng.normal(size=shape).astype(np.float32)) for name in names}
        return drawn | _plain_norms(shape) | {"weight_out": jnp.ones(shape, jnp.float32)}


def _plain_norms(shape: tuple[int, int]) -> Arrays:
    """Make the gains and biases of both norms, (L, O): 1 and 0."""
    ones, zeros = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    norms = ("norm_base", "norm_lora")
    return {f"{norm}.weight": ones for norm in norms} | {f"{norm}.bias": zeros for norm in norms}


@dataclass(frozen=True)
class Router(Learned):
    """RAMoLE's router: for each token and module, attention over the adapters' outputs.

        alpha_i = softmax_i(q' v_i / sqrt(O)),   q = B_r A_r x,   v_i = s_i B_i A_i x,   y = y_b + sum_i alpha_i v_i

    Every module that an adapter updates has a trained RouterLoRA (A_r, B_r). Before training the result is the mean of
    the adapters' outputs.

    Attributes:
        rank: of the RouterLoRA.

    Raises:
        UsageError: the rank is below 1.
    """

    name: ClassVar[str] = "router"
    reference: ClassVar[str] = "RAMoLE, arXiv 2406.16989"

    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            msg = f"a router of rank {self.rank}: wanted 1 or more"
            raise UsageError(msg)

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
