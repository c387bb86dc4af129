"""The alignment itself: groups of modules of equal shape, one after the other, so that memory is bounded."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.sharding import Mesh

from jcrosslora.cache.keys import digest_of
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.weight_stacks import load_stack
from jcrosslora.distributed import hosts
from jcrosslora.errors import HostError, MethodError
from jcrosslora.linalg import mesh_of, over_layers, spread
from jcrosslora.maps.alignment.task import AlignmentTask, reads_stream
from jcrosslora.maps.alignment.transport import Agreement, TransportGroup, measure
from jcrosslora.maps.alignment.transport_cache import TransportCache, arrays_of, facts_of, group_of, kept_layers
from jcrosslora.maps.evidence.activations import batch_probes
from jcrosslora.maps.evidence.providers import providers_of
from jcrosslora.maps.evidence.records import Evidence, Maps, Side
from jcrosslora.maps.evidence.request import AddEvidence, ModuleStack
from jcrosslora.maps.method import MapMethod
from jcrosslora.relation.pairing import SIMILAR, Pair
from jcrosslora.utils.progress import track

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import Probes

ALIGN = "align"  # the step, as it names itself on the display
# Pairs that are aligned together, and their group where it lies in the cache.
_Chunk = tuple[tuple[Pair, ...], TransportGroup | None]
_Stacks = tuple[jax.Array, jax.Array]


def with_text(task: AlignmentTask, probes: Probes | None) -> AlignmentTask:
    """Return the task with the text that it is made from, and with the layers that the text pairs.

    `probes` is the text that both bases are run on; None lets the source write it where the maps need any.

    Raises:
        UsageError: no text has a position that matches.
        CheckpointError: a base or its tokenizer cannot be read.
    """
    if not task.reads_probes:
        return dataclasses.replace(task, probes=probes)
    source, target = task.pair.source, task.pair.target
    probes, batches = batch_probes(source, target, probes, seed=task.seed)
    task = dataclasses.replace(task, probes=probes, batches=tuple(batches))
    if task.depth != SIMILAR:
        return task

    def find() -> Sequence[int | None]:
        from jcrosslora.maps.alignment.layer_similarity import layer_similarity, ordered_layers

        return ordered_layers(layer_similarity(source, target, batches))

    return task.with_layers(kept_layers(task.pair.cache, probes.digest(), find))


def align_groups(task: AlignmentTask) -> Iterator[TransportGroup]:
    """Align the modules, a group of equal shapes and bounded size at a time; nothing for a method without maps.

    The task has its text if it needs any (see `with_text`).
    """
    request = task.request
    providers = providers_of(request.kinds)
    cache = task.pair.cache if any(provider.is_costly for provider in providers) else None
    start = task.method.start
    kept = None if cache is None or start is None else TransportCache(cache, start, request)

    @lru_cache  # when the first group is met that is not kept
    def collected() -> list[AddEvidence]:
        return [provider.collect(request) for provider in providers]

    chunks = list(task.chunks())
    if not chunks:
        return
    found = kept.find(chunks) if kept is not None and hosts.is_first() else itertools.repeat(None)
    store = task.pair.store
    background = store.in_background() if store is not None else nullcontext()
    with background, track(len(request.modules), ALIGN, "modules") as bar:
        for (pairs, group), stacks in _read_ahead(task, zip(chunks, found, strict=False)):
            if stacks is None:
                group = _sent(pairs, group)
            else:
                own = _align(task, tuple(hosts.own_part(pairs)), stacks, collected())
                group = _gathered(pairs, own)
                if kept is not None:
                    kept.keep(group)
            stacks = None  # while the next but one are read
            yield group
            bar.update(len(pairs))


def check_hosts(task: AlignmentTask) -> None:
    """Check, where several processes align together, that they can and that all were given the same.

    Raises:
        MethodError: the bases have to run on text.
        HostError: the processes were given different input.
    """
    if hosts.count() == 1:
        return
    if task.runs_bases:
        what = f"method {task.method.name}" if task.method.runs_bases else f"the depth map {SIMILAR}"
        msg = (
            f"{what} runs the bases on text, which several processes do not do together; name a method that looks "
            "at weights alone, such as cross-lora, or use one process"
        )
        raise MethodError(msg)
    bases = task.pair.source, task.pair.target
    stated = [
        [name, module.shape, module.tensor, module.rows] for base in bases for name, module in base.modules.items()
    ]
    stated += [[file.stat().st_size for base in bases for file in base.store.files]]
    settings = task.method.cache_key(), task.rank, task.depth, task.seed
    found = hosts.exchange("work", digest_of(settings, stated, task.modules))
    if len(set(found)) > 1:
        msg = "the processes were not given the same bases, adapter and settings; start all of them alike"
        raise HostError(msg)
    digests = hosts.shared(None if task.pair.store is None else task.pair.store.digests)
    for base in bases:
        base.digest(digests)


def _read_ahead(task: AlignmentTask, chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, _Stacks | None]]:
    """Yield each chunk, with the weights of this process's part of it where it has to be aligned.

    The weights of a chunk are read and put on the devices while the one before is aligned.
    """

    def read(pairs: Sequence[Pair]) -> _Stacks:
        src = load_stack(task.pair.source, [pair.source for pair in pairs])
        return src, load_stack(task.pair.target, [pair.target for pair in pairs])

    waiting: deque[tuple[_Chunk, Future[_Stacks] | None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        for chunk in itertools.chain(chunks, (None,)):
            if chunk is not None:
                is_kept = hosts.exchange("kept", chunk[1] is not None)[0]
                waiting.append((chunk, None if is_kept else reader.submit(read, hosts.own_part(chunk[0]))))
            if waiting and (chunk is None or len(waiting) > 1):
                first, reading = waiting.popleft()
                stacks = None if reading is None else reading.result()
                del reading
                yield first, stacks
                del stacks


def _align(
    task: AlignmentTask, pairs: tuple[Pair, ...], stacks: _Stacks, evidence_adders: Sequence[AddEvidence]
) -> TransportGroup:
    source, target = task.pair.source, task.pair.target
    shapes = source.modules[pairs[0].source].shape, target.modules[pairs[0].target].shape
    stack = ModuleStack(pairs, *stacks, rank=min(task.rank, *shapes[0], *shapes[1]))
    evidence = Evidence(
        src=_side(source, [pair.source for pair in pairs], stack.source),
        tgt=_side(target, [pair.target for pair in pairs], stack.target),
        vocabulary=None,
        activations=None,
        key=None,
        reads=reads_stream(pairs[0]),
        rank=stack.rank,
        method=(task.method.start or task.method).name,
    )
    for add in evidence_adders:
        evidence = add(evidence, stack)
    assert task.method.start is not None
    maps, agreement = _map_stack(evidence, task.method.start, mesh_of(stack.source))
    terms, agreement = jax.tree.map(lambda x: x[: len(pairs)], (maps.terms, agreement))
    # Waiting here keeps one group in flight: it bounds memory, and on a CPU two programs that both call LAPACK take
    # the cores from each other (measured: 6 times slower).
    return jax.block_until_ready(TransportGroup(terms, agreement, pairs, tuple(stack.kernels)))


def _side(base: BaseModel, names: Sequence[str], stack: jax.Array) -> Side:
    gains = [base.residual_gain(name) for name in names]
    gains += gains[-1:] * (stack.shape[0] - len(names))
    return Side(stack, spread(np.stack(gains)), None)


@partial(jax.jit, static_argnames=("method", "mesh"))
def _map_stack(evidence: Evidence, method: MapMethod, mesh: Mesh | None) -> tuple[Maps, Agreement]:
    def one(evidence: Evidence, vocabulary: object) -> tuple[Maps, Agreement]:
        evidence = dataclasses.replace(evidence, vocabulary=vocabulary)
        maps = method.maps(evidence)
        return maps, measure(evidence, maps, by_coordinates=method.measure == "weight cosine")

    return over_layers(one, mesh, dataclasses.replace(evidence, vocabulary=None), evidence.vocabulary)


def _gathered(pairs: tuple[Pair, ...], own: TransportGroup) -> TransportGroup:
    """Return the group of all pairs, from the parts that the processes have aligned."""
    if hosts.count() == 1:
        return own
    arrays = {name: np.asarray(array) for name, array in arrays_of(own).items()}
    sides = (own.kernels[: len(own.pairs)], own.kernels[len(own.pairs) :]) if own.kernels else ()
    arrays, kernels = hosts.gather(f"maps of {pairs[0].target}", arrays, sides, len(pairs))
    return group_of(pairs, arrays, facts_of(own) | {"kernels": [name for side in kernels for name in side]})


def _sent(pairs: tuple[Pair, ...], kept: TransportGroup | None) -> TransportGroup:
    """Return the group that the first process has found in its cache."""
    if hosts.count() == 1:
        assert kept is not None
        return kept
    facts, own = ({}, {}) if kept is None else (facts_of(kept), arrays_of(kept))
    arrays = hosts.send({name: np.asarray(array) for name, array in own.items()})
    return group_of(pairs, arrays, hosts.from_first("facts", lambda: facts))
