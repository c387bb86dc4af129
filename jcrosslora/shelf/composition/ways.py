"""The ways to compose adapters, by name: per prompt, or per token with AutoLoRA's gate or RAMoLE's router.

Selection and mixture are those of LoraRetriever (arXiv 2402.09997), the stack is that of SD-LoRA (ICLR 2025, openreview
5U1rlpX68A), the gate that of AutoLoRA (arXiv 2508.02107), the router that of RAMoLE (arXiv 2406.16989).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.adapter import Adapter, add_adapters
from jcrosslora.architectures.ops import einsum, layer_norm, linear
from jcrosslora.errors import UsageError, suggestion
from jcrosslora.shelf.composition.composition import (
    Arrays,
    Composition,
    ModuleArrays,
    Updates,
    add_weighted,
    read_all,
    write_all,
)

SHARE = "share"  # the array of `Stack`
EPS = 1e-5  # of both norms of a gate, as in AutoLoRA's code
_FAR = -1e30  # a score whose softmax is zero, and without NaN if it is the only one
_OF_PEFT = ("fusion", "linear", "ties", "dare", "dare_ties", "dare_linear", "magnitude_prune")


@dataclass(frozen=True)
class Select(Composition):
    """Each prompt runs with the one adapter that has its largest weight, the first of equal ones."""

    name: ClassVar[str] = "select"
    needs_weights: ClassVar[bool] = True

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for the adapter of the largest weight."""
        found = np.zeros_like(weights)
        rows = np.arange(len(weights))
        largest = weights.argmax(axis=1)
        found[rows, largest] = weights[rows, largest] > 0
        return found

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Return the chosen adapter unchanged."""
        del arrays
        return adapters[int(np.argmax(shares))]


@dataclass(frozen=True)
class Mixture(Composition):
    """y = y_b + sum_i w_i B_i A_i x, with the weights of a prompt divided by their sum."""

    name: ClassVar[str] = "mixture"

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Put the factors of the adapters side by side; the ranks add up."""
        del arrays
        return _weighted_sum(adapters, shares, lambda _, number: shares[number])


@dataclass(frozen=True)
class Uniform(Mixture):
    """A control: the mean of all adapters with a positive weight, in equal parts. A gate has to be better."""

    name: ClassVar[str] = "uniform"

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return equal shares of the adapters with a positive weight."""
        return super().shares(_chosen(weights))


@dataclass(frozen=True)
class Learned(Composition):
    """A composition whose trained arrays decide how much each adapter with a positive weight adds."""

    trained: ClassVar[bool] = True

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for adapters with a positive weight."""
        return _chosen(weights)


@dataclass(frozen=True)
class Stack(Learned):
    """SD-LoRA's sum: the directions of all adapters, with a trained magnitude for each module and adapter.

        y = y_b + sum_i a_i D_i x,   D_i = s_i B_i A_i / (|s_i| ||B_i|| ||A_i||)

    The magnitudes a_i are trained as shares of the adapters' magnitudes |s_i| ||B_i|| ||A_i||, so that the rate means
    the same for large and small updates. Before training every share is 1.
    """

    name: ClassVar[str] = "stack"

    def first_arrays(self, updates: Updates, seed: int) -> Arrays:
        """Keep the magnitude of every update."""
        del seed
        return {SHARE: jnp.ones(updates.a.shape[:2], jnp.float32)}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the adapters' outputs with their magnitudes."""
        return add_weighted(x, out, updates, updates.shares[:, None, :] * updates.arrays[SHARE])

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Put the factors side by side, with the trained magnitudes; the ranks add up."""
        return _weighted_sum(adapters, shares, lambda name, number: float(arrays[f"{name}.{SHARE}"][number]))


@dataclass(frozen=True)
class Gated(Learned):
    """AutoLoRA's gate: for each token, module and output number a factor on each adapter's output.

        g_i = sigmoid(LN(y_b) * w_b + LN(y_i) * w_l + LN(y_b) * LN(y_i) * w_c + b),   y = y_b + sum_i w_o * g_i * y_i

    y_b is the module's output in the base, y_i = s_i B_i A_i x that of an adapter, and all products are
    elementwise. The arrays have the names of AutoLoRA's code; both norms have a gain and a bias.

    AutoLoRA starts from normal numbers. This starts from zeros and w_o = 2/N: every gate is 1/2, and before it is
    trained the result is the mean of all N adapters' outputs.
    """

    name: ClassVar[str] = "gated"

    def first_arrays(self, updates: Updates, seed: int) -> Arrays:
        """Make a gate that is 1/2 everywhere."""
        del seed
        shape, count = updates.b.shape[:2], updates.a.shape[1]
        zeros = dict.fromkeys(("weight_base", "weight_lora", "weight_cross", "bias"), jnp.zeros(shape, jnp.float32))
        norms = {f"{one}.weight": jnp.ones(shape, jnp.float32) for one in ("norm_base", "norm_lora")}
        norms |= {f"{one}.bias": jnp.zeros(shape, jnp.float32) for one in ("norm_base", "norm_lora")}
        return zeros | norms | {"weight_out": jnp.full(shape, 2 / count, jnp.float32)}

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
class Router(Learned):
    """RAMoLE's router: for each token and module, attention over the adapters' outputs.

        alpha_i = softmax_i(q' v_i / sqrt(O)),   q = B_r A_r x,   v_i = s_i B_i A_i x,   y = y_b + sum_i alpha_i v_i

    Every module that an adapter updates has a trained RouterLoRA (A_r, B_r). Before training the result is the mean of
    the adapters' outputs. `rank` is that of the RouterLoRA, at least 1.
    """

    name: ClassVar[str] = "router"

    rank: int = 8

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"a router of rank {self.rank}: expected 1 or more")

    def first_arrays(self, updates: Updates, seed: int) -> Arrays:
        """Draw A_r uniformly in +-1/sqrt(I) and set B_r to zero, as LoRA does."""
        (layers, out), inputs = updates.b.shape[:2], updates.a.shape[-1]
        bound = inputs**-0.5
        drawn = np.random.default_rng(seed).uniform(-bound, bound, (layers, self.rank, inputs))
        b = jnp.zeros((layers, out, self.rank), jnp.float32)
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


COMPOSITIONS: dict[str, type[Composition]] = {one.name: one for one in (Select, Mixture, Gated, Router, Stack, Uniform)}


def find_composition(how: str | Composition) -> Composition:
    """Return the composition of this name with its default settings; an object is returned unchanged.

    Raises UsageError if the name is unknown, or that of a rule which peft has.
    """
    if isinstance(how, Composition):
        return how
    if how in _OF_PEFT:
        msg = f"composition {how!r} is not here: it changes the parameters of adapters by a rule that peft has: write "
        raise UsageError(msg + "one adapter with peft's add_weighted_adapter and take that, or use mixture")
    if how not in COMPOSITIONS:
        msg = f"composition {how!r} is unknown{suggestion(str(how), COMPOSITIONS)}; use one of "
        raise UsageError(msg + ", ".join(COMPOSITIONS))
    return COMPOSITIONS[how]()


def _chosen(weights: np.ndarray) -> np.ndarray:
    """Return 1 if a weight is positive, else 0: float32 of the same shape."""
    return (weights > 0).astype(np.float32)


def _weighted_sum(adapters: Sequence[Adapter], shares: Sequence[float], factor: Callable[[str, int], float]) -> Adapter:
    """Add the adapters with a positive share, each module times a factor of its name and the adapter's number."""

    def weighted(number: int, adapter: Adapter) -> Adapter:
        modules = {name: replace(one, scale=one.scale * factor(name, number)) for name, one in adapter.modules.items()}
        return replace(adapter, modules=modules)

    return add_adapters([weighted(number, one) for number, one in enumerate(adapters) if shares[number] > 0])
