"""The groups of one transport as named arrays, and in the cache: one entry each, to limit memory to a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jcrosslora.cache.keys import digest_of
from jcrosslora.linalg import LinearMap, place
from jcrosslora.maps.alignment.transport import Agreement, TransportGroup
from jcrosslora.maps.evidence.base_pair import PairCache
from jcrosslora.maps.evidence.providers import providers_of
from jcrosslora.maps.evidence.request import EvidenceRequest, pairs_as_json
from jcrosslora.maps.evidence.singular_vectors import describe
from jcrosslora.maps.method import MapMethod
from jcrosslora.relation.pairing import Pair


class TransportCache:
    """Finds and keeps the groups of the transport of one pair of bases by one method."""

    def __init__(self, cache: PairCache, method: MapMethod, request: EvidenceRequest) -> None:
        """Derive the key from the method's fields and from what the evidence providers say."""
        providers = providers_of(request.kinds)
        facts = [provider.cache_key(request) for provider in providers]
        tokenizers = any(provider.reads_tokenizers for provider in providers)
        self._store = cache.store
        self._key = cache.key(method.cache_key(), sorted(request.kinds), request.rank, facts, tokenizers=tokenizers)
        self._what = f"{method.name}, rank {request.rank}, {cache.names}"

    def find(self, chunks: Sequence[tuple[Pair, ...]]) -> Iterator[TransportGroup | None]:
        """Yield the groups of these pairs, one after the other; None for one that is not kept.

        While one is used the next is read: two are in memory.
        """
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._load, chunks[0])
            for following in [*chunks[1:], None]:
                group = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._load, following)
                yield group

    def _load(self, pairs: tuple[Pair, ...]) -> TransportGroup | None:
        loaded = self._store.load("transport", self._group_key(pairs))
        if loaded is None:
            return None
        return group_of(pairs, loaded.arrays, loaded.facts)

    def keep(self, group: TransportGroup) -> None:
        """Keep a group."""
        what = f"{self._what}, {describe([pair.target for pair in group.pairs])}"
        self._store.save("transport", self._group_key(group.pairs), what, arrays_of(group), facts_of(group))

    def _group_key(self, pairs: Sequence[Pair]) -> str:
        return digest_of(self._key, pairs_as_json(pairs), MAP_FIELDS, AGREEMENT_FIELDS)


def kept_layers(
    cache: PairCache | None, probes: str, find: Callable[[], Sequence[int | None]]
) -> tuple[int | None, ...]:
    """Return the layers that are alike on texts: for each target layer the source layer.

    `probes` is the digest of the texts. `find` finds the layers if they are not kept, as without a cache.
    """
    key = "" if cache is None else cache.key(probes, tokenizers=True)
    facts = None if cache is None else cache.store.facts("depth", key)
    if facts is not None:
        return tuple(facts["layers"])
    layers = tuple(None if layer is None else int(layer) for layer in find())
    if cache is not None:
        cache.store.save("depth", key, f"layers that are alike, {cache.names}", {}, {"layers": list(layers)})
    return layers


MAP_FIELDS = tuple(field.name for field in dataclasses.fields(LinearMap))
AGREEMENT_FIELDS = tuple(field.name for field in dataclasses.fields(Agreement))
_SIDES = ("out", "in")


def arrays_of(group: TransportGroup) -> dict[str, jax.Array]:
    """Return all arrays of a group by name, each with the leading axis of its pairs."""
    arrays = {
        f"term{term}_{side}_{field}": getattr(linear, field)
        for term, maps in enumerate(group.terms)
        for side, linear in zip(_SIDES, maps, strict=True)
        for field in MAP_FIELDS
    }
    return arrays | {field: getattr(group.agreement, field) for field in AGREEMENT_FIELDS}


def facts_of(group: TransportGroup) -> dict[str, Any]:
    """Return the other fields of a group as JSON values, without its pairs."""
    return {"terms": len(group.terms), "kernels": list(group.kernels)}


def group_of(pairs: tuple[Pair, ...], arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> TransportGroup:
    """Rebuild a group on the local devices."""
    placed = {name: place(array) for name, array in arrays.items()}
    terms = tuple(
        tuple(LinearMap(*(placed[f"term{term}_{side}_{field}"] for field in MAP_FIELDS)) for side in _SIDES)
        for term in range(facts["terms"])
    )
    agreement = Agreement(*(placed[field] for field in AGREEMENT_FIELDS))
    return TransportGroup(terms, agreement, pairs, tuple(facts["kernels"]))  # type: ignore[arg-type]
