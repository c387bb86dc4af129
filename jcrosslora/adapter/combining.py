"""Split and merge updates: parts of one matrix, stacks of adapters for `jax.vmap`, and exact sums of adapters.

A layout describes matrices that hold several logical modules as row slices (phi3's qkv_proj): fused module ->
((logical module, first row, last row + 1), ...).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.names import is_by_weight
from jcrosslora.adapter.records import Adapter, AdapterInfo, Carried, as_adapter, check_always_active, restrict
from jcrosslora.checkpoint.base import BaseInfo
from jcrosslora.errors import AdapterError

Layout = Mapping[str, Sequence[tuple[str, int, int]]]
# Updates of the parts of a fused module, with their first and last (exclusive) row.
Placed = Sequence[tuple[LoRAFactors, int, int]]


def split_fused(adapter: Adapter, fused: Layout) -> Adapter:
    """Give each logical module its own update: its rows of B, and the shared A.

    Raises AdapterError if a fused update's rows do not match the layout, or a part also has its own update.
    """
    modules: dict[str, LoRAFactors] = {}
    for name, factors in adapter.modules.items():
        parts = _split(name, factors, fused[name]) if name in fused else {name: factors}
        if twice := parts.keys() & modules.keys():
            msg = f"{adapter.info.name}: module {min(twice)!r} has two updates, one in a fused module"
            raise AdapterError(msg + ": keep one of them")
        modules |= parts
    return dataclasses.replace(adapter, modules=modules)


def fuse(modules: Mapping[str, LoRAFactors], fused: Layout) -> dict[str, LoRAFactors]:
    """Merge the updates of logical modules exactly into one update per fused module.

    The A's are stacked and the B's block-diagonal, so ranks add up; if all parts have the same A (split from a fused
    update), the rank stays. A missing part gets zero rows. Raises AdapterError if the shapes of a part do not fit its
    rows, or the parts read inputs of different widths.
    """
    owner = {part: name for name, parts in fused.items() for part, _, _ in parts}
    merged: dict[str, LoRAFactors] = {}
    for name, factors in modules.items():
        holder = owner.get(name)
        if holder is None:
            merged[name] = factors
        elif holder not in merged:
            merged[holder] = _fuse(holder, modules, fused[holder])
    return merged


def _split(name: str, factors: LoRAFactors, parts: Sequence[tuple[str, int, int]]) -> dict[str, LoRAFactors]:
    total = max(stop for _, _, stop in parts)
    if factors.b.shape[0] != total:
        msg = f"module {name!r} has an update of {factors.b.shape[0]} rows, the base has {total}"
        raise AdapterError(msg + ": the adapter belongs to another base")
    return {part: LoRAFactors(a=factors.a, b=factors.b[start:stop], scale=factors.scale) for part, start, stop in parts}


def _fuse(name: str, modules: Mapping[str, LoRAFactors], parts: Sequence[tuple[str, int, int]]) -> LoRAFactors:
    present = [(modules[part], start, stop) for part, start, stop in parts if part in modules]
    for factors, start, stop in present:
        if factors.b.shape[0] != stop - start or factors.a.shape[1] != present[0][0].a.shape[1]:
            msg = f"module {name!r}: an update of shape {factors.shape} does not fit rows {start} to {stop}"
            raise AdapterError(msg + " of the base: the adapter belongs to another base")
    scale = present[0][0].scale
    if any(factors.scale != scale for factors, _, _ in present):
        present, scale = [(_bake(factors), start, stop) for factors, start, stop in present], 1.0
    rows = max(stop for _, _, stop in parts)
    all_share_a = all(np.array_equal(present[0][0].a, factors.a) for factors, _, _ in present[1:])
    a, b = (_shared if all_share_a else _block_diagonal)(present, rows)
    return LoRAFactors(a=a, b=b, scale=scale)


def _bake(factors: LoRAFactors) -> LoRAFactors:
    b = np.asarray(factors.b)
    # In bfloat16 or float16 the product with the scale would be rounded to 8 or 11 bits of mantissa.
    wide = np.float64 if b.dtype == np.float64 else np.float32
    return LoRAFactors(a=factors.a, b=b.astype(wide) * wide(factors.scale))


def _shared(present: Placed, rows: int) -> tuple[np.ndarray, np.ndarray]:
    b = np.zeros((rows, present[0][0].rank), _common_dtype([factors.b for factors, _, _ in present]))
    for factors, start, stop in present:
        b[start:stop] = np.asarray(factors.b)
    return np.asarray(present[0][0].a), b


def _block_diagonal(present: Placed, rows: int) -> tuple[np.ndarray, np.ndarray]:
    dtype = _common_dtype([factors.a for factors, _, _ in present])
    a = np.concatenate([np.asarray(factors.a).astype(dtype) for factors, _, _ in present])
    b = np.zeros((rows, a.shape[0]), _common_dtype([factors.b for factors, _, _ in present]))
    column = 0
    for factors, start, stop in present:
        b[start:stop, column : column + factors.rank] = np.asarray(factors.b)
        column += factors.rank
    return a, b


def _common_dtype(arrays: Sequence) -> np.dtype:
    dtypes = {np.asarray(array).dtype for array in arrays}
    mixed = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
    return dtypes.pop() if len(dtypes) == 1 else mixed


def fit_to_base(adapter: Adapter, base: BaseInfo, *, every: bool = True) -> Adapter:
    """Check an adapter's module names and shapes against a base, and split fused modules.

    With `every` false, modules that the base lacks are allowed. Raises AdapterError for a stack of adapters, an unknown
    module, or a module of another shape.
    """
    if any(factors.a.ndim != 2 for factors in adapter.modules.values()):
        msg = f"{adapter.info.name}: a stack of adapters, expected one: map over it with jax.vmap(jcrosslora.apply, "
        raise AdapterError(msg + "in_axes=(None, 0)), or take it apart with jcrosslora.unstack_adapters")
    adapter = split_fused(adapter, base.fused)
    unknown = [name for name in adapter.modules if name not in base.shapes]
    if unknown and every:
        msg = f"adapter {adapter.info.name} updates {len(unknown)} modules, {unknown[0]} the first, that the base "
        msg += f"{base.name} ({base.family}, {len(base.shapes)} modules) does not have; give the base it was trained on"
        raise AdapterError(msg)
    for name, factors in adapter.modules.items():
        if factors.b.ndim != 2 or factors.b.shape[1] != factors.rank:
            msg = f"adapter {adapter.info.name}: {name} has a of shape {factors.a.shape} and b of {factors.b.shape}; "
            raise AdapterError(msg + "they must be (K, I) and (O, K)")
        came, want = factors.shape, base.shapes.get(name, factors.shape)
        if came != want:
            msg = f"adapter {adapter.info.name} has an update of {came[0]} x {came[1]} for {name}, which is "
            msg += f"{want[0]} x {want[1]} in the base {base.name}; give the base it was trained on"
            raise AdapterError(msg)
    return adapter


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Stack N adapters into one whose a (N, K, I) and b (N, O, K) have a leading axis.

    Scales that differ are folded into b, in float32. Arrays of different dtypes are promoted.

    The adapters, at least one, must have the same modules, shapes, ranks and invocation tokens, and update only linear
    modules. An AdapterError names the first difference.
    """
    if not adapters:
        raise AdapterError("no adapters to stack; give at least one")
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


def unstack_adapters(stacked: Adapter | Mapping[str, LoRAFactors] | Any) -> list[Adapter]:
    """Split a stack into its adapters, each with its provenance.

    The stack comes from `stack_adapters`, or from a vmapped function such as `jcrosslora.apply`.
    """
    whole = as_adapter(stacked)
    counts = {leaf.shape[0] for leaf in jax.tree.leaves(whole)}
    if len(counts) != 1 or any(item.a.ndim != 3 for item in whole.modules.values()):
        raise AdapterError(f"{whole.info.name}: not a stack of adapters; make one with stack_adapters")
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
        raise AdapterError(f"{other.info.name} changes {changed[0]}; only updates of linear modules can be stacked")
    if alone := first.modules.keys() ^ other.modules.keys():
        msg = f"module {min(alone)!r} has an update in one of {names} only; stack adapters of the same modules"
        raise AdapterError(msg)
    for name, one in first.modules.items():
        two = other.modules[name]
        if (one.shape, one.rank) != (two.shape, two.rank):
            msg = f"module {name!r} has shape {one.shape} and rank {one.rank} in {first.info.name}, {two.shape} and "
            raise AdapterError(msg + f"{two.rank} in {other.info.name}; stack adapters of one base and equal ranks")
    if first.info.invocation != other.info.invocation:
        raise AdapterError(f"{names} have different invocation tokens (aLoRA); stack adapters of the same ones")


def add_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Add adapters: the update of each module is the sum of their updates.

    The ranks of a module add up; a module in only one adapter keeps its factors. Changes of embedding
    and head are kept if only one adapter has any; else they are listed in `info.ignored`, as are replaced tensors. A
    single adapter is returned unchanged. Raises AdapterError if none was given, one is active only after certain
    tokens, or shapes differ.
    """
    if not adapters:
        raise AdapterError("no adapters to add: give at least one")
    if len(adapters) == 1:
        return adapters[0]
    for adapter in adapters:
        check_always_active(adapter, "and has no sum with others: write it alone")
    why = "a sum has no tensors that replace those of the base, and no updates of experts"
    adapters = [restrict(adapter, Carried.LINEAR | Carried.TOKENS, why) for adapter in adapters]
    if len([adapter for adapter in adapters if adapter.tokens]) > 1:
        adapters = [restrict(one, Carried.LINEAR, "several adapters of the sum change them") for one in adapters]
    named = {f"{name}.weight" for one in adapters for name in one.modules if is_by_weight(one.info.config, name)}
    templates = {adapter.info.chat_template for adapter in adapters}
    info = AdapterInfo(
        name=" + ".join(adapter.info.name for adapter in adapters),
        config={"target_parameters": sorted(named)} if named else {},
        base_name=adapters[0].info.base_name,
        prefix=adapters[0].info.prefix,
        chat_template=templates.pop() if len(templates) == 1 else None,  # if all have the same one
        ignored=tuple(sentence for adapter in adapters for sentence in adapter.info.ignored),
        unread=any(adapter.info.unread for adapter in adapters),
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
        raise AdapterError(f"module {name!r} has updates of {shapes}; give adapters of one base")
    a = np.concatenate([np.asarray(factors.a).astype(np.float32) for factors in terms])
    b = [np.asarray(factors.b).astype(np.float32) * np.float32(factors.scale) for factors in terms]
    return LoRAFactors(a=a, b=np.concatenate(b, axis=1))
