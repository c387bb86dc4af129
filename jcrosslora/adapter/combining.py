"""Combine adapters of one base: stacks, for `jax.vmap` over adapters, and exact sums."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.records import Adapter, AdapterInfo, Carried, as_adapter, check_always_active, restrict
from jcrosslora.errors import AdapterError


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Stack N adapters into one whose a (N, K, I) and b (N, O, K) have a leading axis.

    Scales that differ are folded into b, in float32. Arrays of different dtypes are promoted.

    The adapters, at least one, must have the same modules, shapes, ranks and invocation tokens, and updates of linear
    modules alone. An AdapterError names the first difference.
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


def unstack_adapters(stacked: Adapter | Mapping[str, LoRAFactors]) -> list[Adapter]:
    """Split a stack into its adapters, with the provenance that each one had.

    It is from `stack_adapters`, or what a vmapped function such as `jcrosslora.apply` made of one.
    """
    whole = as_adapter(stacked)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(whole)}
    if len(counts) != 1 or any(item.a.ndim != 3 for item in whole.modules.values()):
        msg = f"{whole.info.name}: not a stack of adapters; make one with stack_adapters"
        raise AdapterError(msg)
    count = counts.pop()
    infos = whole.info.stacked or (whole.info,) * count
    parts = [jax.tree.map(lambda leaf, index=index: leaf[index], whole) for index in range(count)]
    return [dataclasses.replace(part, info=info) for part, info in zip(parts, infos, strict=True)]


def _stacked(items: Sequence[LoRAFactors]) -> LoRAFactors:
    scales = {item.scale for item in items}
    b = [item.b if len(scales) == 1 else jnp.asarray(item.b, jnp.float32) * jnp.float32(item.scale) for item in items]
    return LoRAFactors(
        a=_stack([item.a for item in items]), b=_stack(b), scale=scales.pop() if len(scales) == 1 else 1.0
    )


def _stack(arrays: Sequence) -> jnp.ndarray:
    dtype = jnp.result_type(*(array.dtype for array in arrays))
    return jnp.stack([jnp.asarray(array, dtype) for array in arrays])


def _check_alike(first: Adapter, other: Adapter) -> None:
    names = f"{first.info.name} and {other.info.name}"
    changed = [update.table for update in other.tokens] + [name for own in other.replaced for name in own.tensors]
    if changed := [*changed, *(update.name for update in other.experts)]:
        msg = f"{other.info.name} changes {changed[0]}; only updates of linear modules can be stacked"
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


def add_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Add adapters: the update of each module is the sum of their updates.

    The rank of a module is the sum of its ranks; a module of one adapter only keeps its factors. Changes of embedding
    and head are kept if only one adapter has any; else they are listed in `info.ignored`, as are replaced tensors. A
    single adapter is returned unchanged. Raises AdapterError if none was given, one is active only after certain
    tokens, or shapes differ.
    """
    if not adapters:
        msg = "no adapters to add: give at least one"
        raise AdapterError(msg)
    if len(adapters) == 1:
        return adapters[0]
    for adapter in adapters:
        check_always_active(adapter, "and has no sum with others: write it alone")
    why = "a sum has no tensors that replace those of the base, and no updates of experts"
    adapters = [restrict(adapter, Carried.LINEAR | Carried.TOKENS, why) for adapter in adapters]
    if len([adapter for adapter in adapters if adapter.tokens]) > 1:
        adapters = [restrict(one, Carried.LINEAR, "several adapters of the sum change them") for one in adapters]
    info = AdapterInfo(
        name=" + ".join(adapter.info.name for adapter in adapters),
        base_name=adapters[0].info.base_name,
        prefix=adapters[0].info.prefix,
        ignored=tuple(sentence for adapter in adapters for sentence in adapter.info.ignored),
    )
    tokens = tuple(update for adapter in adapters for update in adapter.tokens)
    names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    parts = {name: [one.modules[name] for one in adapters if name in one.modules] for name in names}
    return Adapter({name: add_factors(name, terms) for name, terms in parts.items()}, info, tokens)


def add_factors(name: str, terms: Sequence[LoRAFactors]) -> LoRAFactors:
    """Concatenate the factors of updates of one module along the rank; see `add_adapters`."""
    if len(terms) == 1:
        return terms[0]
    if len({factors.shape for factors in terms}) > 1:
        shapes = " and ".join(f"{rows} x {columns}" for rows, columns in sorted({each.shape for each in terms}))
        msg = f"module {name!r} has updates of {shapes}; give adapters of one base"
        raise AdapterError(msg)
    a = np.concatenate([np.asarray(factors.a).astype(np.float32) for factors in terms])
    b = [np.asarray(factors.b).astype(np.float32) * np.float32(factors.scale) for factors in terms]
    return LoRAFactors(a=a, b=np.concatenate(b, axis=1))
