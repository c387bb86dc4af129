"""What a way of composing adapters is: the weights of each prompt in, the outputs of modules out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.errors import UsageError
from jcrosslora.shelf.composition.updates import Arrays, RoleSizes, Updates, add_weighted


@dataclass(frozen=True)
class Composition:
    """A way in which N adapters of one base act at once; its fields are its settings.

    This class adds the mean of the adapters' outputs. A subclass changes what it does otherwise.

    Attributes:
        name: by which it is asked for.
        reference: where it is published.
        trained: whether it has arrays that are trained.
        needs_weights: whether it does nothing sensible with several adapters of equal weights.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    trained: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    def check(self, adapters: Sequence[Adapter]) -> None:
        """Refuse adapters that cannot be composed in this way.

        Raises:
            AdapterError: they cannot.
        """

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Say how much of each adapter a prompt gets.

        Args:
            weights: float32 (P, N) of P prompts, from 0 on, as a user or a retrieval gives them.

        Returns:
            float32 (P, N), what `apply` takes; zeros where the row of a prompt is zeros, which gets the base alone.
        """
        total = weights.sum(axis=1, keepdims=True)
        return weights / np.where(total > 0, total, 1)

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Make the arrays of a role that belong to the composition, as they are before they are trained.

        Args:
            sizes: of the role.
            count: N.
            seed: of what is drawn.

        Returns:
            By name, float32 with a first axis of the L layers; empty where there are none.
        """
        del sizes, count, seed
        return {}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Return the output of a module with the adapters.

        Args:
            x: (B, T, I), what the module reads.
            out: float32 (B, T, O), what it returns without adapters.
            updates: of one layer, without their axis L.

        Returns:
            float32 (B, T, O).
        """
        return add_weighted(x, out, updates, updates.shares[:, None, :])

    def as_adapter(
        self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: Mapping[str, np.ndarray]
    ) -> Adapter:
        """Make the one adapter that does the same as all adapters with these shares.

        Args:
            adapters: N of them.
            shares: of each.
            arrays: of the composition, by module and name as in `ComposedAdapter.by_module`.

        Raises:
            UsageError: there is none, because the composition depends on the text.
        """
        del adapters, shares, arrays
        msg = f"{self.name} decides by token, which no single adapter does: save the composition instead, or take one "
        raise UsageError(msg + "of select, mixture, uniform and fusion")


def chosen(weights: np.ndarray) -> np.ndarray:
    """Return 1 where a weight is positive, else 0: float32 of the same shape."""
    return (weights > 0).astype(np.float32)
