"""The ways of composing by name, and those whose shares do not depend on the token."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors
from jcrosslora.adapter.combining import add_adapters
from jcrosslora.errors import AdapterError, UsageError, suggestion
from jcrosslora.shelf.composition.composition import (
    Arrays,
    Composition,
    ModuleArrays,
    RoleSizes,
    Updates,
    add_weighted,
    read_all,
    write_all,
)
from jcrosslora.shelf.composition.gates import Gated, Learned, RandomGate, Router, chosen

SHARE = "share"  # the array of `Stack`


@dataclass(frozen=True)
class Select(Composition):
    """Each prompt runs with the one adapter that has its largest weight, the first of equal ones."""

    name: ClassVar[str] = "select"
    reference: ClassVar[str] = "LoraRetriever, arXiv 2402.09997"
    needs_weights: ClassVar[bool] = True

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for the adapter of the largest weight."""
        found = np.zeros_like(weights)
        rows = np.arange(len(weights))
        largest = weights.argmax(axis=1)
        found[rows, largest] = weights[rows, largest] > 0
        return found

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Return the chosen adapter as it is."""
        del arrays
        return adapters[int(np.argmax(shares))]


@dataclass(frozen=True)
class Mixture(Composition):
    """y = y_b + sum_i w_i B_i A_i x, with the weights of a prompt divided by their sum."""

    name: ClassVar[str] = "mixture"
    reference: ClassVar[str] = "LoraRetriever, arXiv 2402.09997"

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Put the factors of the adapters side by side; the ranks add up."""
        del arrays
        return _weighted_sum(adapters, shares, lambda _, number: shares[number])


@dataclass(frozen=True)
class Uniform(Mixture):
    """A control: the mean of all adapters with a positive weight, in equal parts. A gate has to be better."""

    name: ClassVar[str] = "uniform"
    reference: ClassVar[str] = "control"

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return equal shares of the adapters with a positive weight."""
        return super().shares(chosen(weights))


@dataclass(frozen=True)
class Fusion(Composition):
    """y = y_b + (sum_i w_i s_i B_i) (sum_j w_j A_j) x: the factors are averaged, each by itself.

    So it is published; it has the rank of one adapter and depends on how each update is split into factors. The mean of
    the updates themselves is `mixture`.
    """

    name: ClassVar[str] = "fusion"
    reference: ClassVar[str] = "LoraRetriever, arXiv 2402.09997"

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Raise AdapterError if the adapters' ranks differ in a module."""
        ranks: dict[str, tuple[int, str]] = {}
        for adapter in adapters:
            for name, factors in adapter.modules.items():
                rank, first = ranks.setdefault(name, (factors.rank, adapter.info.name))
                if rank != factors.rank:
                    msg = f"fusion averages factors of one rank, and {name} has rank {rank} in {first}, {factors.rank} "
                    msg += f"in {adapter.info.name}: take mixture, or write them at one rank (jcrosslora export)"
                    raise AdapterError(msg)

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the update of the mean factors."""
        shares = updates.shares[:, None, :, None]
        inner = jnp.sum(read_all(x, updates.a) * shares, axis=-2, keepdims=True)
        return out + write_all((inner * shares).astype(x.dtype), updates.b)

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Average the factors; a module that an adapter does not update counts as zeros."""
        del arrays
        modules: dict[str, LoRAFactors] = {}
        for adapter, share in zip(adapters, shares, strict=True):
            for name, one in adapter.modules.items() if share > 0 else ():
                a, b = (np.float32(share) * np.asarray(each, np.float32) for each in (one.a, one.b))
                b = b * np.float32(one.scale)
                old = modules.get(name)
                modules[name] = LoRAFactors(a=a, b=b) if old is None else LoRAFactors(a=old.a + a, b=old.b + b)
        first = adapters[0].info
        return Adapter(modules, AdapterInfo("mean of factors", first.base_name, prefix=first.prefix))


@dataclass(frozen=True)
class Stack(Learned):
    """SD-LoRA's sum: the directions of all adapters, with a trained magnitude for each module and adapter.

        y = y_b + sum_i a_i D_i x,   D_i = s_i B_i A_i / (|s_i| ||B_i|| ||A_i||)

    The magnitudes a_i are trained as shares of the adapters' magnitudes |s_i| ||B_i|| ||A_i||, so that the rate means
    the same for large and small updates. Before training every share is 1.
    """

    name: ClassVar[str] = "stack"
    reference: ClassVar[str] = "SD-LoRA, ICLR 2025 (openreview 5U1rlpX68A)"

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Keep the magnitude of every update."""
        del seed
        return {SHARE: jnp.ones((sizes.layers, count), jnp.float32)}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the adapters' outputs with their magnitudes."""
        return add_weighted(x, out, updates, updates.shares[:, None, :] * updates.arrays[SHARE])

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Put the factors side by side, with the trained magnitudes; the ranks add up."""
        return _weighted_sum(adapters, shares, lambda name, number: float(arrays[f"{name}.{SHARE}"][number]))


COMPOSITIONS: dict[str, type[Composition]] = {
    one.name: one for one in (Select, Mixture, Fusion, Gated, Router, Stack, Uniform, RandomGate)
}
_OF_PEFT = ("ties", "dare", "dare_ties", "dare_linear", "magnitude_prune")


def find_composition(how: str | Composition) -> Composition:
    """Return the composition of this name with its default settings; an object is returned as it is.

    Raises:
        UsageError: the name is unknown, or that of a rule which peft has.
    """
    if isinstance(how, Composition):
        return how
    if how in _OF_PEFT:
        msg = f"composition {how!r} is not here: it changes the parameters of adapters by a rule that peft has: write "
        raise UsageError(msg + "one adapter with peft's add_weighted_adapter and take that, or use mixture")
    if how not in COMPOSITIONS:
        known = f"{suggestion(str(how), COMPOSITIONS)}; use one of {', '.join(COMPOSITIONS)}"
        msg = f"composition {how!r} is unknown{known}"
        raise UsageError(msg)
    return COMPOSITIONS[how]()


def _weighted_sum(adapters: Sequence[Adapter], shares: Sequence[float], factor: Callable[[str, int], float]) -> Adapter:
    """Add the adapters with a positive share, each module times a factor of its name and the adapter's number."""
    used = []
    for number, (adapter, share) in enumerate(zip(adapters, shares, strict=True)):
        if share > 0:
            modules = {
                name: dataclasses.replace(one, scale=one.scale * factor(name, number))
                for name, one in adapter.modules.items()
            }
            used.append(dataclasses.replace(adapter, modules=modules))
    return add_adapters(used)
