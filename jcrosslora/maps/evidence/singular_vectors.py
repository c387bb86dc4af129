"""Truncated SVDs of the weights of both bases."""

import dataclasses
from functools import partial
from typing import Any

import jax

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.weight_stacks import load_stack
from jcrosslora.linalg import TruncatedSVD, decompose
from jcrosslora.maps.evidence.factor_cache import FactorCache
from jcrosslora.maps.evidence.records import Evidence
from jcrosslora.maps.evidence.request import EvidenceRequest, ModuleStack
from jcrosslora.utils.cost import Cost


class SingularVectorProvider:
    """Adds the truncated SVDs of both weights, computed or read from the cache."""

    is_costly = True
    reads_tokenizers = False

    def check(self, request: EvidenceRequest) -> None:
        """Accept every request."""

    def cost(self, request: EvidenceRequest, texts: int) -> Cost:
        """Count a decomposition of each matrix."""
        del texts
        sides, rank, vectors = request.shapes, request.rank, request.single_vectors
        return Cost(decomposed=tuple((one, min(rank, *one), vectors) for pair in sides for one in pair))

    def cache_key(self, request: EvidenceRequest) -> Any:
        """Return whether single vectors matter."""
        return request.single_vectors

    def collect(self, request: EvidenceRequest) -> Any:
        """Return a function that decomposes a stack; modules share nothing."""
        pair = request.pair
        caches = (None, None) if pair.cache is None else (pair.cache.source, pair.cache.target)

        def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
            names = [item.source for item in stack.pairs], [item.target for item in stack.pairs]
            decomposed = []
            for side, base in enumerate((pair.source, pair.target)):
                weights = (stack.source, stack.target)[side]
                svd, kernels = _decompose(base, names[side], weights, stack.rank, request.single_vectors, caches[side])
                stack.kernels.extend(kernels[: len(stack.pairs)])
                decomposed.append(svd)
            src, tgt = decomposed
            return dataclasses.replace(
                evidence,
                src=dataclasses.replace(evidence.src, svd=src),
                tgt=dataclasses.replace(evidence.tgt, svd=tgt),
            )

        return add


def _decompose(
    base: BaseModel, names: list[str], weights: jax.Array, rank: int, single_vectors: bool, cache: FactorCache | None
) -> tuple[TruncatedSVD, tuple[str, ...]]:
    if cache is None:
        return decompose(weights, rank, vectors=single_vectors)
    return cache.decompose(names, rank, vectors=single_vectors, stack=weights, load=partial(load_stack, base))
