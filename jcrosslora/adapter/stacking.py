"""Stacks of adapters: a leading axis on every factor, for `jax.vmap` over adapters."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.errors import AdapterError


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Stack N adapters into one whose a (N, K, I) and b (N, O, K) have a leading axis.

    Scales that differ are folded into b, in float32. Arrays of different dtypes are promoted.

    Args:
        adapters: at least one, all with the same modules, shapes, ranks and invocation tokens, and without changes of
            embedding or head, which are not arrays of one shape.

    Raises:
        AdapterError: there are none, or they differ; names the first difference.
    """
    if not adapters:
        msg = "no adapters to stack; give at least one"
        raise AdapterError(msg)
    for adapter in adapters:
        _check_alike(adapters[0], adapter)
    infos = tuple(adapter.info for adapter in adapters)
    info = AdapterInfo(
        name=f"stack of {len(adapters)} adapters",
        base_name=infos[0].base_name,
        kind=infos[0].kind,
        invocation=infos[0].invocation,
        stacked=infos,
    )
    return Adapter({name: _stacked([one.modules[name] for one in adapters]) for name in adapters[0].modules}, info)


def unstack_adapters(stacked: Adapter) -> list[Adapter]:
    """Split a stack into its adapters, with the provenance that each one had.

    Raises:
        AdapterError: not a stack.
    """
    if any(item.a.ndim != 3 for item in stacked.modules.values()):
        msg = f"{stacked.info.name}: not a stack of adapters; make one with stack_adapters"
        raise AdapterError(msg)
    count = next(iter(stacked.modules.values())).a.shape[0]
    infos = stacked.info.stacked or (stacked.info,) * count
    return [
        Adapter(
            {name: dataclasses.replace(item, a=item.a[i], b=item.b[i]) for name, item in stacked.modules.items()},
            infos[i],
        )
        for i in range(count)
    ]


def _stacked(items: Sequence[LoRAFactors]) -> LoRAFactors:
    scales = {item.scale for item in items}
    b = [item.b if len(scales) == 1 else jnp.asarray(item.b, jnp.float32) * jnp.float32(item.scale) for item in items]
    a = [item.a for item in items]
    return LoRAFactors(a=_stack(a), b=_stack(b), scale=scales.pop() if len(scales) == 1 else 1.0)


def _stack(arrays: Sequence) -> jnp.ndarray:
    dtype = jnp.result_type(*(array.dtype for array in arrays))
    return jnp.stack([jnp.asarray(array, dtype) for array in arrays])


def _check_alike(first: Adapter, other: Adapter) -> None:
    names = f"{first.info.name} and {other.info.name}"
    if other.tokens:
        msg = f"{other.info.name} changes {other.tokens[0].table}; only updates of linear modules can be stacked"
        raise AdapterError(msg)
    if alone := first.modules.keys() ^ other.modules.keys():
        msg = f"module {min(alone)!r} has an update in one of {names} only; stack adapters of the same modules"
        raise AdapterError(msg)
    for name, one in first.modules.items():
        two = other.modules[name]
        if (one.shape, one.rank) != (two.shape, two.rank):
            msg = f"module {name!r} has shape {one.shape} and rank {one.rank} in {first.info.name}, {two.shape} and "
            raise AdapterError(msg + f"{two.rank} in {other.info.name}; stack adapters of one base and equal ranks")
    if first.info.invocation != other.info.invocation:
        msg = f"{names} have different invocation tokens (aLoRA); stack adapters of the same ones"
        raise AdapterError(msg)
