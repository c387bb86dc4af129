"""Truncated SVDs of the weights of both bases, and their cache, which all pairs of a base share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.weight_stacks import load_on_host, load_stack
from jcrosslora.linalg import TruncatedSVD, decompose, spread, stack_rows
from jcrosslora.maps.evidence import Evidence
from jcrosslora.maps.task import AddEvidence, AlignmentTask, ModuleStack
from jcrosslora.utils.cache import Cache
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.digests import digest_of, numerics_key

_FIELDS = tuple(field.name for field in dataclasses.fields(TruncatedSVD))
_KIND = "factors"
# The arrays of one module's decomposition, and the kernel that computed it.
_Row = tuple[dict[str, np.ndarray], str]
# Hex digits of each half of a key: the first digests weights, rank and numerics, the second the names of the modules.
_DIGITS = 32


def collect_singular_vectors(task: AlignmentTask) -> AddEvidence:
    """Return a function that decomposes a stack, or reads what the cache has."""
    pair, vectors = task.pair, task.single_vectors

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        sides = []
        for index, (base, side) in enumerate(zip(pair, (evidence.src, evidence.tgt), strict=True)):
            if pair.store is None:
                svd, kernels = decompose(side.weight, evidence.rank, vectors=vectors)
            else:
                cache = FactorCache(pair.store, base, pair.weights[index], evidence.rank, vectors=vectors)
                svd, kernels = cache.decompose(stack.names[index], side.weight)
            stack.kernels.extend(kernels[: len(stack.pairs)])
            sides.append(dataclasses.replace(side, svd=svd))
        return dataclasses.replace(evidence, src=sides[0], tgt=sides[1])

    return add


def singular_vectors_cost(task: AlignmentTask, texts: int) -> Cost:
    """Count a decomposition of each matrix."""
    del texts
    sides = [shape for pair in task.modules for shape in task.shapes(pair)]
    return Cost(decomposed=tuple((shape, min(task.rank, *shape), task.single_vectors) for shape in sides))


class FactorCache:
    """Decomposes modules of one base, or reads decompositions that this pair or another has cached.

    An entry holds the modules of one stack, and is found by the first half of its key for modules of any stack: their
    factors are the same on a CPU, and equal to within rounding if an accelerator works on all matrices at once.
    """

    def __init__(self, store: Cache, base: BaseModel, weights: str, rank: int, *, vectors: bool) -> None:
        """Open the entries of rank R; `weights` is the digest of the base's weights, `vectors` as for `decompose`."""
        self._store, self._base, self._rank, self._vectors = store, base, rank, vectors
        self._scope = digest_of(weights, rank, vectors, numerics_key(), _FIELDS)[:_DIGITS]

    def decompose(self, names: Sequence[str], stack: Any) -> tuple[TruncatedSVD, Sequence[str]]:
        """Return the truncated SVDs of a stack (L', O, I) of L modules, and the kernel that computed each of the L."""
        found = self._find(names)
        missing = [name for name in names if name not in found]
        if missing:
            load = load_on_host if isinstance(stack, np.ndarray) else load_stack
            fresh = stack if len(missing) == len(names) else load(self._base, missing)
            svd, kernels = decompose(fresh, self._rank, vectors=self._vectors)
            self._keep(missing, svd, kernels)
            if fresh is stack:
                return svd, kernels[: len(names)]
            found |= _rows(missing, {field: np.asarray(getattr(svd, field)) for field in _FIELDS}, kernels)
        rows = [found[name][0] for name in names]
        rows += rows[-1:] * (stack.shape[0] - len(names))
        fields: list[Any] = [stack_rows([row[field] for row in rows]) for field in _FIELDS]
        svd = TruncatedSVD(*(fields if isinstance(stack, np.ndarray) else map(spread, fields)))
        return svd, [found[name][1] for name in names]

    def _find(self, names: Sequence[str]) -> dict[str, _Row]:
        own = self._key(names)
        found: dict[str, _Row] = {}
        # Try the entry of the same stack first: it makes reading others unnecessary.
        for key in [own, *(key for key in self._store.keys(_KIND, self._scope) if key != own)]:
            facts = self._store.facts(_KIND, key)
            if facts is not None and set(facts["modules"]) & (set(names) - found.keys()):
                loaded = self._store.load(_KIND, key)
                if loaded is not None:
                    rows = _rows(facts["modules"], loaded.arrays, facts["kernels"])
                    found |= {name: rows[name] for name in names if name in rows and name not in found}
            if len(found) == len(names):
                break
        return found

    def _keep(self, names: Sequence[str], svd: TruncatedSVD, kernels: Sequence[str]) -> None:
        arrays = {field: np.asarray(getattr(svd, field)) for field in _FIELDS}
        if len(svd.u) > len(names):
            arrays = {field: array[: len(names)] for field, array in arrays.items()}
        facts = {"modules": list(names), "kernels": list(kernels[: len(names)])}
        what = f"rank {self._rank}, {public_name(self._base.name) or self._base.name}, {describe(names)}"
        self._store.save(_KIND, self._key(names), what, arrays, facts)

    def _key(self, names: Sequence[str]) -> str:
        return f"{self._scope}-{digest_of(list(names))[:_DIGITS]}"


def describe(names: Sequence[str]) -> str:
    """Describe modules by their number and their roles."""
    roles = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return f"{len(names)} x {' '.join(roles)}"


def _rows(names: Sequence[str], arrays: Mapping[str, np.ndarray], kernels: Sequence[str]) -> dict[str, _Row]:
    return {name: ({field: arrays[field][row] for field in _FIELDS}, kernels[row]) for row, name in enumerate(names)}
