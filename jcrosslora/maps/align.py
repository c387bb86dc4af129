"""Compute an alignment: groups of modules of equal shape, one after the other, so that memory is bounded."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from jcrosslora.architectures.blocks import LINEARS
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.weight_stacks import load_on_host, load_stack
from jcrosslora.linalg import map_on_host, mesh_of, over_layers, shard, stack_rows
from jcrosslora.maps.evidence import (
    AddEvidence,
    Evidence,
    EvidenceKind,
    Maps,
    ModuleStack,
    Side,
    Vocabulary,
    pairs_as_json,
)
from jcrosslora.maps.groups import AGREEMENT_FIELDS, MAP_FIELDS, TransportGroup, measure
from jcrosslora.maps.method import MapMethod, Plan
from jcrosslora.maps.providers import describe, providers_of
from jcrosslora.relation.pairing import Pair
from jcrosslora.utils.digests import digest_of
from jcrosslora.utils.progress import track

ALIGN = "align"  # the name of the step on the display
T = TypeVar("T")
U = TypeVar("U")
# Pairs that are aligned together, and their group if it is cached.
_Chunk = tuple[tuple[Pair, ...], TransportGroup | None]
_Stacks = tuple[Any, Any]  # numpy arrays if `_on_host`


def align_groups(plan: Plan) -> Iterator[TransportGroup]:
    """Align the modules, one group of equal shapes and bounded size at a time; yield nothing without maps.

    If the plan needs text, it must have it already (see `with_text`).
    """
    providers = providers_of(plan.kinds)
    chunks, store = list(plan.chunks()), plan.pair.store
    if not chunks:
        return
    cache = TransportCache(plan) if store is not None and any(one.cache_key for one in providers) else None

    @lru_cache  # computed at the first group that is not cached
    def collected() -> list[AddEvidence]:
        return [provider.collect(plan) for provider in providers]

    found = itertools.repeat(None) if cache is None else _one_ahead(cache.find, chunks)
    background = store.in_background() if store is not None else nullcontext()
    with background, track(len(plan.modules), ALIGN, "modules") as bar:
        chosen = zip(chunks, found, strict=False)
        for (pairs, group), stacks in _one_ahead(partial(_with_weights, plan), chosen):
            if group is None:
                group = _align(plan, pairs, stacks, collected())
                if cache is not None:
                    cache.keep(group)
            stacks = None  # free them, as the next ones are read already
            yield group
            bar.update(len(pairs))


class TransportCache:
    """Finds and keeps the groups of a transport in the cache: one entry per group, to limit memory to one group."""

    def __init__(self, plan: Plan) -> None:
        """Derive the key from the method's fields and the evidence providers."""
        providers, method = providers_of(plan.kinds), plan.method.map_method
        assert plan.pair.store is not None
        assert method is not None
        facts = [None if one.cache_key is None else one.cache_key(plan) for one in providers]
        parts = method.cache_key(), sorted(plan.kinds), plan.rank, facts
        self._store = plan.pair.store
        self._key = plan.pair.key(*parts, tokenizers=any(one.reads_tokenizers for one in providers))
        self._what = f"{method.name}, rank {plan.rank}, {plan.pair.names}"

    def find(self, pairs: tuple[Pair, ...]) -> TransportGroup | None:
        """Return the group of these pairs; None if it is not cached."""
        loaded = self._store.load("transport", self._group_key(pairs))
        return None if loaded is None else TransportGroup.of(pairs, loaded.arrays, loaded.facts)

    def keep(self, group: TransportGroup) -> None:
        """Write a group to the cache."""
        what = f"{self._what}, {describe([pair.target for pair in group.pairs])}"
        self._store.save("transport", self._group_key(group.pairs), what, group.arrays(), group.facts())

    def _group_key(self, pairs: Sequence[Pair]) -> str:
        return digest_of(self._key, pairs_as_json(pairs), MAP_FIELDS, AGREEMENT_FIELDS)


def _one_ahead(call: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """Yield the result of a call for each item, in order. A thread computes the next result while one is used."""
    ahead: deque[Future[U]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        for item in items:
            ahead.append(pool.submit(call, item))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _with_weights(plan: Plan, chunk: _Chunk) -> tuple[_Chunk, _Stacks | None]:
    """Read the weights of pairs without a group, to the host for numpy or else to the devices."""
    load = load_on_host if _on_host(plan.method.map_method) else load_stack
    pairs, group = chunk
    if group is not None:
        return chunk, None
    src = load(plan.pair.source, [pair.source for pair in pairs])
    return chunk, (src, load(plan.pair.target, [pair.target for pair in pairs]))


def _align(
    plan: Plan, pairs: tuple[Pair, ...], stacks: _Stacks | None, evidence_adders: Sequence[AddEvidence]
) -> TransportGroup:
    method = plan.method.map_method
    assert method is not None
    assert stacks is not None
    src, tgt = plan.shapes(pairs[0])
    stack, stream = ModuleStack(pairs, len(stacks[0])), LINEARS[pairs[0].role].stream
    evidence = Evidence(
        *map(partial(_side, stack), plan.pair, stack.names, stacks),
        vocabulary=None,
        activations=None,
        key=None,
        reads=stream == "reads",
        rank=min(plan.rank, *src, *tgt),
        method=method.name,
    )
    for add in evidence_adders:
        evidence = add(evidence, stack)
    if stream == "inside":  # inside latent attention, where no vector is a function of a token
        evidence = dataclasses.replace(evidence, vocabulary=None)
    if _on_host(method):
        maps, agreement = _map_on_host(evidence, method)
        return TransportGroup(maps.terms, agreement, pairs, tuple(stack.kernels))
    maps, agreement = _map_stack(evidence, method, mesh_of(stacks[0]))
    terms, agreement = jax.tree.map(lambda x: x[: len(pairs)], (maps.terms, agreement))
    # Waiting here keeps one group in flight. This bounds memory; and on a CPU two programs that both call LAPACK
    # compete for the cores (measured: 6 times slower).
    return jax.block_until_ready(TransportGroup(terms, agreement, pairs, tuple(stack.kernels)))


def _side(stack: ModuleStack, base: BaseModel, names: Sequence[str], weights: Any) -> Side:
    gains = stack.filled([base.residual_gain(name) for name in names])
    found: Any = np.stack(gains)
    return Side(weights, found if isinstance(weights, np.ndarray) else shard(found), None)


def _on_host(method: MapMethod | None) -> bool:
    """Return whether numpy makes the maps, module by module in threads, so that nothing is compiled."""
    if method is None or EvidenceKind.RANDOM_KEY in method.requires:  # numpy cannot draw from JAX keys
        return False
    return method.takes_numpy and jax.default_backend() == "cpu"


def _map_on_host(evidence: Evidence, method: MapMethod) -> tuple[Maps, dict[str, Any]]:
    vocabulary = jax.tree.map(np.asarray, evidence.vocabulary)
    stacked = jax.tree.map(np.asarray, dataclasses.replace(evidence, vocabulary=None))

    def one(row: int) -> tuple[Maps, dict[str, Any]]:
        with np.errstate(all="ignore"):  # as in XLA, where undefined figures are NaN
            return _maps_of(method, jax.tree.map(lambda x: x[row], stacked), vocabulary)

    found = list(map_on_host(one, range(len(evidence.src.weight))))
    return jax.tree.map(lambda *leaves: stack_rows(leaves), *found)


@partial(jax.jit, static_argnames=("method", "mesh"))
def _map_stack(evidence: Evidence, method: MapMethod, mesh: Mesh | None) -> tuple[Maps, dict[str, Any]]:
    stacked = dataclasses.replace(evidence, vocabulary=None)
    return over_layers(partial(_maps_of, method), mesh, stacked, evidence.vocabulary)


def _maps_of(method: MapMethod, evidence: Evidence, vocabulary: Vocabulary | None) -> tuple[Maps, dict[str, Any]]:
    """Return the maps of one pair of modules with their figures."""
    evidence = dataclasses.replace(evidence, vocabulary=vocabulary)
    maps = method.maps(evidence)
    return maps, measure(evidence, maps, by_coordinates=method.measure == "weight cosine")
