"""The interface of a composition of adapters, and the stacked updates that the decoder applies it to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.architectures import module_name
from jcrosslora.architectures.ops import linear
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import stack_adapters
from jcrosslora.errors import AdapterError, UsageError

Arrays = dict[str, jax.Array]
ModuleArrays = Mapping[str, np.ndarray]  # "MODULE.NAME" -> array, see `ComposedAdapter.by_module`


@dataclass(frozen=True)
class Composition:
    """A way in which N adapters of one base act at once; its fields are its settings.

    This class adds the mean of the adapters' outputs; subclasses change what they do differently.

    Attributes:
        trained: whether it has arrays that are trained.
        needs_weights: whether several adapters with equal weights make no sense.
    """

    name: ClassVar[str]
    trained: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False

    def shares(self, weights: np.ndarray) -> np.ndarray:
        """Turn weights of P prompts, float32 (P, N) from 0 on, as a user or a retrieval gives them, into shares.

        The shares, float32 (P, N), are what `apply` takes. A row of zeros stays one and is the base alone.
        """
        total = weights.sum(axis=1, keepdims=True)
        return weights / np.where(total > 0, total, 1)

    def first_arrays(self, updates: Updates, seed: int) -> Arrays:
        """Make the arrays for the updates of a role as they are before training: by name, float32 (L, ...)."""
        del updates, seed
        return {}

    def apply(self, x: jax.Array, out: jax.Array, updates: Updates) -> jax.Array:
        """Return the output of a module with the adapters, float32 (B, T, O).

        Args:
            x: (B, T, I), the module's input.
            out: float32 (B, T, O), its output without adapters.
            updates: of one layer, without their axis L.
        """
        return add_weighted(x, out, updates, updates.shares[:, None, :])

    def as_adapter(self, adapters: Sequence[Adapter], shares: Sequence[float], arrays: ModuleArrays) -> Adapter:
        """Make the one adapter that does the same as all adapters with these shares.

        Raises UsageError if there is none, because the composition depends on the text.
        """
        del adapters, shares, arrays
        msg = f"{self.name} decides by token, which no single adapter does: save the composition instead, or take one "
        raise UsageError(msg + "of select, mixture and uniform")


@flax.struct.dataclass
class Updates:
    """What N adapters change in the modules of one role, for a batch of B prompts.

    Attributes:
        a: float32 (L, N, K, I), padded with zeros to the largest rank K.
        b: float32 (L, O, N, K), multiplied by the scale.
        shares: float32 (L, B, N), see `Composition.shares`; the same in all layers.
        arrays: of the composition, (L, ...) each.
    """

    a: jax.Array
    b: jax.Array
    shares: jax.Array
    arrays: Arrays
    how: Composition = flax.struct.field(pytree_node=False)

    def apply(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Return a module's output with the adapters, see `Update`."""
        return self.how.apply(x, out, self)


@flax.struct.dataclass
class ComposedAdapter:
    """Several adapters as the decoder applies them at once: role -> updates, for the roles that any adapter updates."""

    roles: dict[str, Updates]

    def with_shares(self, shares: np.ndarray | jax.Array, how: Composition | None = None) -> ComposedAdapter:
        """Set the shares of a batch of prompts, float32 (B, N), and the composition unless it is None."""
        roles = {}
        for role, one in self.roles.items():
            whole = jnp.broadcast_to(shares, (len(one.a), *shares.shape))
            roles[role] = dataclasses.replace(one, shares=whole, how=how or one.how)
        return ComposedAdapter(roles)

    def with_arrays(self, arrays: Mapping[str, Arrays]) -> ComposedAdapter:
        """Replace the composition's arrays, by role."""
        roles = {role: dataclasses.replace(one, arrays=dict(arrays[role])) for role, one in self.roles.items()}
        return ComposedAdapter(roles)

    def by_module(self, base: BaseModel) -> Arrays:
        """Return the composition's arrays of each module, as "MODULE.NAME" -> array."""
        return {
            f"{module}.{name}": stack[row]
            for role, one in self.roles.items()
            for row, module in enumerate(module_names(base, role))
            for name, stack in one.arrays.items()
        }


def module_names(base: BaseModel, role: str) -> list[str]:
    """Return the names of the modules of a role, by layer."""
    return [module_name(layer, role) for layer in base.layers_with(role)]


def stack_for(how: Composition, adapters: Sequence[Adapter], base: BaseModel, seed: int) -> ComposedAdapter:
    """Stack adapters for a composition, with its first arrays and without any prompt.

    Raises AdapterError if there is no adapter, or one does not fit the base, changes experts or is an aLoRA.
    """
    for adapter in adapters:
        if adapter.experts:
            msg = f"{adapter.info.name}: updates experts ({adapter.experts[0].name}), and only linear modules can be "
            raise AdapterError(msg + "composed: use this adapter alone")
    roles = {}
    for number, (role, one) in enumerate(stack_adapters(adapters, base).roles.items()):
        a, b = one.a.swapaxes(0, 1), jnp.moveaxis(one.b, 0, 2)
        plain = Updates(a, b, jnp.zeros((len(a), 0, len(adapters)), jnp.float32), {}, how)
        roles[role] = dataclasses.replace(plain, arrays=how.first_arrays(plain, seed + number))
    return ComposedAdapter(roles)


def read_all(x: jax.Array, a: jax.Array) -> jax.Array:
    """Return A_i x, float32 (B, T, N, K), of x (B, T, I) and a (N, K, I); products are of the dtype of x."""
    count, rank, width = a.shape
    return linear(x, a.reshape(count * rank, width).astype(x.dtype)).reshape(*x.shape[:-1], count, rank)


def write_all(inner: jax.Array, b: jax.Array) -> jax.Array:
    """Return sum_i B_i inner_i, float32 (B, T, O), of inner (B, T, N, K) and b (O, N, K), products in its dtype."""
    return linear(inner.reshape(*inner.shape[:-2], -1), b.reshape(len(b), -1).astype(inner.dtype))


def add_weighted(x: jax.Array, out: jax.Array, updates: Updates, shares: jax.Array) -> jax.Array:
    """Return out + sum_i shares_i B_i A_i x, float32 (B, T, O), with shares that broadcast to (B, T, N)."""
    inner = read_all(x, updates.a) * shares[..., None]
    return out + write_all(inner.astype(x.dtype), updates.b)  # rounded as one adapter alone is, see `update`
