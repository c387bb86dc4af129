"""The updates of several adapters of one base, stacked for the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import ROLE_PATHS
from jcrosslora.decoder import stack_adapters
from jcrosslora.decoder.ops import linear
from jcrosslora.errors import AdapterError

Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class RoleSizes:
    """The sizes of the modules of a role: layers L, out features O, in features I."""

    layers: int
    out: int
    inputs: int


class Rule(Protocol):
    """The part of a `Composition` that says what a module returns; compared and hashed by value."""

    def first_arrays(self, sizes: RoleSizes, count: int, seed: int) -> Arrays:
        """Make its arrays for a role, see `Composition`."""
        ...

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Return the output of a module with the adapters, see `Composition`."""
        ...


@flax.struct.dataclass
class Updates:
    """What N adapters change in the modules of one role, for a batch of B prompts.

    Attributes:
        a: float32 (L, N, K, I), padded with zeros to the largest rank K.
        b: float32 (L, O, N, K), multiplied by the scale.
        shares: float32 (L, B, N), see `Composition.shares`; the same in all layers.
        arrays: of the composition, (L, ...) each.
        how: the composition.
    """

    a: jax.Array
    b: jax.Array
    shares: jax.Array
    arrays: Arrays
    how: Rule = flax.struct.field(pytree_node=False)

    def apply(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Return a module's output with the adapters, see `RoleUpdates`."""
        return self.how.apply(x, out, self)

    @property
    def sizes(self) -> RoleSizes:
        """Sizes of the role."""
        return RoleSizes(self.a.shape[0], self.b.shape[1], self.a.shape[-1])


@flax.struct.dataclass
class ComposedAdapter:
    """Several adapters as the decoder applies them at once.

    Attributes:
        roles: role -> updates, for the roles that any adapter updates.
    """

    roles: dict[str, Updates]

    def with_shares(self, shares: np.ndarray | jax.Array) -> ComposedAdapter:
        """Return it for a batch of prompts with these shares, float32 (B, N)."""
        roles = {}
        for role, one in self.roles.items():
            whole = jnp.broadcast_to(shares, (one.sizes.layers, *shares.shape))
            roles[role] = dataclasses.replace(one, shares=whole)
        return ComposedAdapter(roles)

    def with_arrays(self, arrays: Mapping[str, Arrays]) -> ComposedAdapter:
        """Return it with other arrays of the composition, by role."""
        roles = {role: dataclasses.replace(one, arrays=dict(arrays[role])) for role, one in self.roles.items()}
        return ComposedAdapter(roles)

    def by_module(self, base: BaseModel) -> Arrays:
        """Return the arrays of the composition, "MODULE.NAME" -> the part of that module."""
        return {
            f"{module}.{name}": stack[place]
            for role, one in self.roles.items()
            for place, module in enumerate(module_names(base, role))
            for name, stack in one.arrays.items()
        }


def module_names(base: BaseModel, role: str) -> list[str]:
    """Return the names of the modules of a role, by layer."""
    return [f"model.layers.{layer}.{ROLE_PATHS[role]}" for layer in base.layers_with(role)]


def stack_for(how: Rule, adapters: Sequence[Adapter], base: BaseModel, seed: int) -> ComposedAdapter:
    """Stack adapters for a composition, with its first arrays and without any prompt.

    Raises:
        AdapterError: there is no adapter, or one does not fit the base, changes experts or is an aLoRA.
    """
    for adapter in adapters:
        if adapter.experts:
            msg = f"{adapter.info.name}: updates experts ({adapter.experts[0].name}), and only linear modules can be "
            raise AdapterError(msg + "composed: use this adapter alone")
    stacked, roles = stack_adapters(adapters, base), {}
    for number, (role, one) in enumerate(stacked.roles.items()):
        a, b = one.a.swapaxes(0, 1), jnp.moveaxis(one.b, 0, 2)
        shares = jnp.zeros((a.shape[0], 0, len(adapters)), jnp.float32)
        found = Updates(a, b, shares, {}, how)
        arrays = how.first_arrays(found.sizes, len(adapters), seed + number)
        roles[role] = Updates(a, b, shares, arrays, how)
    return ComposedAdapter(roles)


def read_all(x: jax.Array, a: jax.Array) -> jax.Array:
    """Return A_i x, float32 (B, T, N, K), of x (B, T, I) and a (N, K, I); products are of the dtype of x."""
    count, rank, width = a.shape
    return linear(x, a.reshape(count * rank, width).astype(x.dtype)).reshape(*x.shape[:-1], count, rank)


def write_all(inner: jax.Array, b: jax.Array) -> jax.Array:
    """Return the sum over i of B_i inner_i, float32 (B, T, O), of inner (B, T, N, K) and b (O, N, K).

    Products are of the dtype of `inner`.
    """
    return linear(inner.reshape(*inner.shape[:-2], -1), b.reshape(len(b), -1).astype(inner.dtype))


def add_weighted(x: jax.Array, out: jax.Array, updates: Updates, shares: jax.Array) -> jax.Array:
    """Return out + sum_i shares_i B_i A_i x, float32 (B, T, O), with shares that broadcast to (B, T, N)."""
    inner = read_all(x, updates.a) * shares[..., None]
    return out + write_all(inner.astype(x.dtype), updates.b)  # rounded as one adapter alone is, see `update`
