"""Split and merge updates of matrices that hold several logical modules as row slices (phi3's qkv_proj).

A layout describes them: fused module -> ((logical module, first row, last row + 1), ...).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.records import Adapter
from jcrosslora.checkpoint.base import BaseInfo
from jcrosslora.errors import AdapterError

Layout = Mapping[str, Sequence[tuple[str, int, int]]]
# Updates of the parts of a fused module, with their first and last (exclusive) row.
Placed = Sequence[tuple[LoRAFactors, int, int]]


def split_fused(adapter: Adapter, fused: Layout) -> Adapter:
    """Give each logical module its own update: its rows of B, and the A that the parts share.

    Raises AdapterError if a fused update has another number of rows than the layout, or a part has its own update too.
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
    """Merge the updates of logical modules into those of the fused modules that hold them, exactly.

    dW of the fused module is B A with the A's stacked and the B's block-diagonal: the rank is the sum of the parts'. If
    all parts have the same A (a split of a fused update) the rank stays. A missing part gets zero rows. Raises
    AdapterError if the shapes of a part do not fit its rows, or the parts read inputs of different widths.
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
    # The product with the scale would be rounded in 8 or 11 bits of mantissa.
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
    """Check that an adapter belongs to a base by names and shapes, and take fused matrices apart.

    With `every` false the adapter may have modules that the base does not have.

    Raises:
        AdapterError: a stack of adapters, a module that the base does not have, or of another shape.
    """
    if any(factors.a.ndim != 2 for factors in adapter.modules.values()):
        msg = f"{adapter.info.name}: a stack of adapters, one was wanted: map over it with jax.vmap(jcrosslora.apply, "
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
