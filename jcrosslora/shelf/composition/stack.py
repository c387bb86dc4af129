"""SD-LoRA's sum: the directions of all adapters, each with a magnitude in every module that can be trained.

    y = y_b + sum_i a_i D_i x,   D_i = s_i B_i A_i / (|s_i| ||B_i|| ||A_i||)

The magnitudes a_i are trained as shares of the adapters' own, |s_i| ||B_i|| ||A_i||, so that the rate means the same
for large and small updates.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.combining import add_adapters
from jcrosslora.shelf.composition.composition import Composition, chosen
from jcrosslora.shelf.composition.updates import Arrays, RoleSizes, Updates, add_weighted

SHARE = "share"


@dataclass(frozen=True)
class Stack(Composition):
    """The sum of the adapters, one magnitude for each module and adapter; before it is trained, each has its own."""

    name: ClassVar[str] = "stack"
    reference: ClassVar[str] = "SD-LoRA, ICLR 2025 (openreview 5U1rlpX68A)"
    trained: ClassVar[bool] = True

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Return 1 for adapters with a positive weight; the magnitudes decide how much each adds."""
        return chosen(weights)

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Give every update its own magnitude."""
        del seed
        return {SHARE: jnp.ones((sizes.layers, count), jnp.float32)}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Add the adapters' outputs with their magnitudes."""
        return add_weighted(x, out, updates, updates.shares[:, None, :] * updates.arrays[SHARE])

    def as_adapter(
        self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: Mapping[str, np.ndarray]
    ) -> Adapter:
        """Put the factors side by side, with the trained magnitudes; the ranks add up."""
        found = []
        for number, (adapter, share) in enumerate(zip(adapters, shares, strict=True)):
            modules = {
                name: dataclasses.replace(one, scale=one.scale * float(arrays[f"{name}.{SHARE}"][number]))
                for name, one in adapter.modules.items()
            }
            found += [dataclasses.replace(adapter, modules=modules)] if share > 0 else []
        return add_adapters(found)
