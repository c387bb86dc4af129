"""Truncated SVDs of the weights of both bases, and their cache, which all pairs of a base share."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import numpy as np

from jcrosslora.cache.keys import digest_of, numerics_key
from jcrosslora.cache.store import Cache
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.hub import public_name
from jcrosslora.checkpoint.weight_stacks import load_stack
from jcrosslora.linalg import TruncatedSVD, decompose, spread
from jcrosslora.maps.evidence.records import Evidence
from jcrosslora.maps.evidence.request import AddEvidence, EvidenceRequest, ModuleStack
from jcrosslora.utils.cost import Cost

_FIELDS = tuple(field.name for field in dataclasses.fields(TruncatedSVD))
_KIND = "factors"
# The arrays of one module's decomposition, and the kernel that computed it.
_Row = tuple[dict[str, np.ndarray], str]
# Hex digits of each half of a key: the first digests weights, rank and numerics, the second the names of the modules.
_DIGITS = 32


def collect_singular_vectors(request: EvidenceRequest) -> AddEvidence:
    """Return a function that decomposes a stack, or reads what the cache has; modules share nothing."""
    bases = request.pair.source, request.pair.target
    cache = request.pair.cache
    caches = (None, None) if cache is None else tuple(map(partial(FactorCache, cache.store), bases, cache.weights))

    def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
        names = [pair.source for pair in stack.pairs], [pair.target for pair in stack.pairs]
        sides = []
        for index, side in enumerate((evidence.src, evidence.tgt)):
            weights, vectors = (stack.source, stack.target)[index], request.single_vectors
            if (factors := caches[index]) is None:
                svd, kernels = decompose(weights, stack.rank, vectors=vectors)
            else:
                svd, kernels = factors.decompose(names[index], weights, stack.rank, vectors=vectors)
            stack.kernels.extend(kernels[: len(stack.pairs)])
            sides.append(dataclasses.replace(side, svd=svd))
        return dataclasses.replace(evidence, src=sides[0], tgt=sides[1])

    return add


def singular_vectors_cost(request: EvidenceRequest, texts: int) -> Cost:
    """Count a decomposition of each matrix."""
    del texts
    sides = [shape for pair in request.shapes for shape in pair]
    return Cost(decomposed=tuple((shape, min(request.rank, *shape), request.single_vectors) for shape in sides))


class FactorCache:
    """Decomposes modules, or reads decompositions that this pair or another has cached.

    An entry holds the modules of one stack. Entries are looked up by the first half of their key, so modules of any
    stack are found. `decompose` treats every matrix on its own: a module's factors are the same in any stack on a
    CPU, and equal to within rounding where an accelerator works on all matrices at once.
    """

    def __init__(self, cache: Cache, base: BaseModel, weights: str) -> None:
        """Open the entries of one base; `weights` is the digest of its weights, from `weights_key`."""
        self._cache, self._base, self._weights = cache, base, weights

    def decompose(
        self, names: Sequence[str], stack: jax.Array, rank: int, *, vectors: bool
    ) -> tuple[TruncatedSVD, tuple[str, ...]]:
        """Return the truncated SVDs of modules of equal shape.

        Args:
            names: the L modules.
            stack: (L', O, I), their weights from `load_stack`.
            rank: R.
            vectors: whether single singular vectors matter, or only the subspace that they span.

        Returns:
            The decomposition with a leading axis L' on every field, and the kernel that computed each of the L modules.
        """
        scope = digest_of(self._weights, rank, vectors, numerics_key(), _FIELDS)[:_DIGITS]
        found = self._find(scope, names)
        missing = [name for name in names if name not in found]
        if len(missing) == len(names):
            svd, kernels = decompose(stack, rank, vectors=vectors)
            self._keep(scope, names, rank, svd, kernels)
            return svd, kernels[: len(names)]
        if missing:
            fresh, kernels = decompose(load_stack(self._base, missing), rank, vectors=vectors)
            self._keep(scope, missing, rank, fresh, kernels)
            found |= _rows(missing, {field: np.asarray(getattr(fresh, field)) for field in _FIELDS}, kernels)
        rows = [found[name][0] for name in names]
        rows += rows[-1:] * (stack.shape[0] - len(names))
        svd = TruncatedSVD(*(spread(np.stack([row[field] for row in rows])) for field in _FIELDS))
        return svd, tuple(found[name][1] for name in names)

    def _find(self, scope: str, names: Sequence[str]) -> dict[str, _Row]:
        own = _key(scope, names)
        found: dict[str, _Row] = {}
        # Try the entry of the same stack first: it makes reading others unnecessary.
        for key in [own, *(key for key in self._cache.keys(_KIND, scope) if key != own)]:
            facts = self._cache.facts(_KIND, key)
            if facts is not None and set(facts["modules"]) & (set(names) - found.keys()):
                loaded = self._cache.load(_KIND, key)
                if loaded is not None:
                    rows = _rows(facts["modules"], loaded.arrays, facts["kernels"])
                    found |= {name: rows[name] for name in names if name in rows and name not in found}
            if len(found) == len(names):
                break
        return found

    def _keep(self, scope: str, names: Sequence[str], rank: int, svd: TruncatedSVD, kernels: Sequence[str]) -> None:
        arrays = {field: np.asarray(getattr(svd, field))[: len(names)] for field in _FIELDS}
        facts = {"modules": list(names), "kernels": list(kernels[: len(names)])}
        what = f"rank {rank}, {public_name(self._base.name) or self._base.name}, {describe(names)}"
        self._cache.save(_KIND, _key(scope, names), what, arrays, facts)


def describe(names: Sequence[str]) -> str:
    """Describe modules by their number and their roles."""
    roles = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
    return f"{len(names)} x {' '.join(roles)}"


def _key(scope: str, names: Sequence[str]) -> str:
    return f"{scope}-{digest_of(list(names))[:_DIGITS]}"


def _rows(names: Sequence[str], arrays: Mapping[str, np.ndarray], kernels: Sequence[str]) -> dict[str, _Row]:
    return {name: ({field: arrays[field][row] for field in _FIELDS}, kernels[row]) for row, name in enumerate(names)}
