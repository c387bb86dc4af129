"""Several adapters of one base in one batch, each in its own rows, or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.ops import linear
from jcrosslora.decoder.model import StackedAdapter

_MOST_RANK = 128  # sum of the adapters' ranks in a module; above it, running them one by one is faster


@flax.struct.dataclass
class RowFactors:
    """The updates of M adapters of one role in L layers, with their ranks side by side.

    Attributes:
        a: float32 (L, M K, I).
        b: float32 (L, O, M K).
        own: float32 (L, B, 1, M K), 1 at the ranks of a row's adapter, else 0; B is 1 if all rows use the same one.
    """

    a: jax.Array
    b: jax.Array
    own: jax.Array

    def apply(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Add the updates to the rows of x (B, T, I), see `Update`."""
        inner = linear(x, self.a.astype(x.dtype)) * self.own
        return out + linear(inner.astype(x.dtype), self.b.astype(x.dtype))


@flax.struct.dataclass
class RowAdapters:
    """M adapters as the decoder applies them, each to its own rows.

    Attributes:
        roles: role -> factors.
        count: M.
    """

    roles: dict[str, RowFactors]
    count: int = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, stacked: StackedAdapter) -> Self | None:
        """Put M stacked adapters side by side; None if they change experts, change nothing or have too high a rank."""
        roles = {}
        for role, factors in stacked.roles.items():
            if factors.a.ndim != len(("M", "L", "K", "I")) or factors.a.shape[0] * factors.a.shape[2] > _MOST_RANK:
                return None
            count, layers, rank, _ = factors.a.shape
            a = jnp.moveaxis(factors.a, 0, 1).reshape(layers, count * rank, -1)
            b = jnp.moveaxis(factors.b, 0, 2).reshape(layers, -1, count * rank)
            roles[role] = RowFactors(a, b, jnp.ones((layers, 1, 1, count * rank)))
        return cls(roles, len(jax.tree.leaves(stacked)[0])) if roles else None

    def of_rows(self, chosen: Sequence[int | None]) -> Self:
        """Choose the adapter of each row, or of all rows with a single entry; None is the base alone."""
        one_hot = np.array([[number == own for number in range(self.count)] for own in chosen], np.float32)
        roles = {}
        for role, factors in self.roles.items():
            layers, ranks = factors.a.shape[:2]
            own = np.repeat(one_hot, ranks // self.count, axis=1)[None, :, None]
            own = jnp.asarray(np.broadcast_to(own, (layers, *own.shape[1:])))
            roles[role] = dataclasses.replace(factors, own=own)
        return dataclasses.replace(self, roles=roles)
