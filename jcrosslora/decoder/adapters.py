"""Adapters in the layout of the decoder: the factors of each role stacked over the layers."""

from collections.abc import Iterable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, LoRAFactors, split_fused
from jcrosslora.checkpoint import ROLES, BaseModel
from jcrosslora.checkpoint.families import ROLE_PATHS
from jcrosslora.decoder.ops import project
from jcrosslora.errors import AdapterError


@flax.struct.dataclass
class StackedFactors:
    """The updates of one role in all layers, dW = b @ a; zeros in layers without one.

    Attributes:
        a: float32 (L, K, I), or (N, L, K, I) of N adapters.
        b: float32 (L, O, K), or (N, L, O, K); the scale is baked in.
    """

    a: jax.Array
    b: jax.Array


@flax.struct.dataclass
class StackedAdapter:
    """An adapter as the decoder applies it, unmerged.

    Attributes:
        roles: role -> its factors; roles without an update are left out.
    """

    roles: dict[str, StackedFactors]


def stack_adapter(adapter: Adapter, base: BaseModel) -> StackedAdapter:
    """Stack the factors of an adapter; smaller ranks of a role are padded with zeros.

    Updates of matrices that the base holds as one (phi3's qkv_proj) are taken apart.

    Raises:
        AdapterError: a module that the base does not have, factors that do not fit it, or an aLoRA.
    """
    adapter = split_fused(adapter, base.fused)
    ranks = _ranks([adapter], base)
    return StackedAdapter({role: _stack_role(adapter, base, role, rank) for role, rank in ranks.items()})


def stack_adapters(adapters: Sequence[Adapter], base: BaseModel) -> StackedAdapter:
    """Stack several adapters along a first axis, for `jax.vmap` over it; roles are those that any of them has.

    Raises:
        AdapterError: no adapter, or one that does not fit the base (see `stack_adapter`).
    """
    if not adapters:
        msg = "no adapters to stack: give at least one"
        raise AdapterError(msg)
    adapters = [split_fused(adapter, base.fused) for adapter in adapters]
    ranks = _ranks(adapters, base)
    each = [{role: _stack_role(one, base, role, rank) for role, rank in ranks.items()} for one in adapters]
    return StackedAdapter(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


def unstack_adapter(stacked: StackedAdapter) -> Adapter:
    """The factors by module again, scale 1; layers whose two factors are all zeros are left out."""
    modules = {}
    for role in (role for role in ROLES if role in stacked.roles):
        factors = stacked.roles[role]
        for layer, (a, b) in enumerate(zip(np.asarray(factors.a), np.asarray(factors.b), strict=True)):
            if a.any() or b.any():
                modules[f"model.layers.{layer}.{ROLE_PATHS[role]}"] = LoRAFactors(a=a, b=b)
    return Adapter(modules=modules)


def join_stacked(first: StackedAdapter, second: StackedAdapter) -> StackedAdapter:
    """The sum of two adapters of one base: in roles that both have, the factors side by side and the ranks added."""
    roles = dict(first.roles)
    for role, added in second.roles.items():
        if role in roles:
            a = jnp.concatenate([roles[role].a, added.a], axis=-2)
            roles[role] = StackedFactors(a, jnp.concatenate([roles[role].b, added.b], axis=-1))
        else:
            roles[role] = added
    return StackedAdapter(roles)


def update(x: jax.Array, factors: StackedFactors) -> jax.Array:
    """float32 (..., O): b (a x) for x (..., I) and the factors of one layer."""
    return _thin(x.astype(jnp.float32), factors.a, factors.b)


# By JAX's own rule the derivative by b begins with a copy of the whole gradient, transposed, in a loop with all that made
# the gradient: by a profile a fifth of a training step on a CPU. This one transposes what is K wide.
@jax.custom_vjp
def _thin(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return project(project(x, a), b)


def _thin_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    inner = project(x, a)
    return project(inner, b), (x, inner, a, b)


def _thin_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, inner, a, b = kept
    by_inner = project(gradient, b.T)
    flat = by_inner.reshape(-1, by_inner.shape[-1])
    by_a = project(flat.T, x.reshape(-1, x.shape[-1]).T)
    by_b = project(inner.reshape(flat.shape).T, gradient.reshape(-1, gradient.shape[-1]).T).T
    return project(by_inner, a.T), by_a, by_b


_thin.defvjp(_thin_forward, _thin_backward)


def _check_acts(adapter: Adapter) -> None:
    if adapter.info.invocation is not None:
        msg = f"adapter {adapter.info.name} acts only after its invocation tokens (aLoRA), which the decoder does not "
        msg += "look for: what it changes cannot be computed; use an adapter that always acts"
        raise AdapterError(msg)


def _ranks(adapters: Iterable[Adapter], base: BaseModel) -> dict[str, int]:
    found: dict[str, int] = {}
    for adapter in adapters:
        _check_acts(adapter)
        for name, factors in adapter.modules.items():
            role = _check_fit(name, factors, adapter, base)
            found[role] = max(found.get(role, 0), factors.rank)
    return {role: found[role] for role in ROLES if role in found}


def _check_fit(name: str, factors: LoRAFactors, adapter: Adapter, base: BaseModel) -> str:
    module = base.modules.get(name)
    if module is None:
        msg = f"{adapter.info.name}: updates {name}, which {base.ref} does not have"
        raise AdapterError(msg)
    if factors.shape != module.shape or factors.b.shape[1] != factors.rank:
        shapes = f"A {list(factors.a.shape)} and B {list(factors.b.shape)}"
        msg = f"{adapter.info.name}: {name} has {shapes}, {base.ref} wants an update of {list(module.shape)}"
        raise AdapterError(msg)
    return module.role


def _stack_role(adapter: Adapter, base: BaseModel, role: str, rank: int) -> StackedFactors:
    layers = base.dims.layers
    rows, columns = base.modules[f"model.layers.0.{ROLE_PATHS[role]}"].shape
    a, b = np.zeros((layers, rank, columns), np.float32), np.zeros((layers, rows, rank), np.float32)
    for layer in range(layers):
        factors = adapter.modules.get(f"model.layers.{layer}.{ROLE_PATHS[role]}")
        if factors is not None:
            a[layer, : factors.rank] = np.asarray(factors.a, np.float32)
            b[layer, :, : factors.rank] = np.asarray(factors.b, np.float32) * np.float32(factors.scale)
    return StackedFactors(jnp.asarray(a), jnp.asarray(b))
