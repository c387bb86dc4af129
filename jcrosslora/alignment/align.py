"""LoRA-Align: two bases in, the maps between their modules out. It never sees an adapter."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jcrosslora.alignment.agreement import Agreement, measure
from jcrosslora.alignment.checks import check_rank, check_shapes, check_whitening, wanted_pairs
from jcrosslora.alignment.group_arrays import arrays_of, facts_of, group_of
from jcrosslora.alignment.pair_cache import PairCache
from jcrosslora.alignment.transport import AlignRecipe, Transport, TransportGroup, describe_base
from jcrosslora.cache import Cache
from jcrosslora.cache.keys import digest_of
from jcrosslora.checkpoint import BaseModel
from jcrosslora.distributed import hosts
from jcrosslora.errors import HostError, MethodError
from jcrosslora.evidence.activations import batch_probes, stack_activations
from jcrosslora.evidence.heads import head_counts, match_heads
from jcrosslora.evidence.records import Evidence, Fit, HeadMatch, Side, Vocabulary
from jcrosslora.evidence.selection import find_selection, select_rows
from jcrosslora.evidence.shared_vocabulary import shared_vocabulary
from jcrosslora.evidence.weight_stacks import bounded_groups, load_stack
from jcrosslora.linalg import decompose, describe_kernels, mesh_of, over_layers, spread
from jcrosslora.lineage import Structure
from jcrosslora.lineage.pairing import SIMILAR, Depth, Pair, pair_modules
from jcrosslora.methods import Method, get_method
from jcrosslora.methods.lorasuite import embedding_map
from jcrosslora.utils.progress import each, track

if TYPE_CHECKING:
    from jcrosslora.alignment.factor_cache import FactorCache
    from jcrosslora.alignment.pair_cache import GroupCache
    from jcrosslora.evidence.moments import CrossMoments
    from jcrosslora.evidence.probes import ProbeBatch, Probes

READERS = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
# Pairs that are aligned together, and their group where it lies in the cache.
_Chunk = tuple[tuple[Pair, ...], TransportGroup | None]


def align(
    source: BaseModel,
    target: BaseModel,
    *,
    method: str = "cross-lora",
    rank: int | None = None,
    depth: Depth = "proportional",
    seed: int = 0,
    sources: Collection[str] | None = None,
    probes: Probes | None = None,
    whitening: float = 0.0,
    cache: Cache | None = None,
    progress: bool = False,
) -> Transport:
    """Find the maps that carry adapters of `source` over to `target` (LoRA-Align, arXiv 2508.05232, section 3).

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        method: a name of the registry, see `jcrosslora.METHODS`.
        rank: truncation rank R of the SVDs; None is 320, the paper's. A module whose short side is smaller uses
            that.
        depth: see `jcrosslora.lineage.pairing.pair_modules`.
        seed: of the random control.
        sources: align only what these source modules feed (those an adapter has); None is all.
        probes: text for the methods that run both bases; None lets the source base write it.
        whitening: exponent of theseus' partial whitening, 0 to 0.5; above 0 it takes three times the memory.
        cache: where factors and transports are kept and looked for, such as `jcrosslora.open_cache()`; None computes
            all and keeps nothing. The numbers are the same.
        progress: whether to show a progress bar.

    Returns:
        The transport, on the default devices.

    Where `jax.distributed` has been initialised, all processes have to call this alike: each reads and decomposes its
    part of the modules, and all of them get the whole transport.

    Raises:
        MethodError: an unknown method, one that cannot be used on these shapes, one without maps, or one that several
            processes cannot do together.
        PairingError: the modules cannot be paired as asked.
        UsageError: a rank below 1 or above the short side of every module, a whitening that the method does not do, or
            a seed outside 0 to 2^32 - 1 for a method that draws.
        CheckpointError: weights that cannot be read or are not finite.
        HostError: another process failed.
    """
    if get_method(method).then != "nothing":
        msg = (
            f"method {method} is more than maps: it makes an update of the target for one adapter; use "
            "jcrosslora.transfer, jcrosslora.fit.distill.distill, jcrosslora.fit.residual.fit_residual or "
            "jcrosslora.fit.interpolation.interpolate_to_source"
        )
        raise MethodError(msg)
    with hosts.together():
        plan = Plan(
            source,
            target,
            method=method,
            rank=rank,
            depth=depth,
            seed=seed,
            sources=sources,
            probes=probes,
            whitening=whitening,
            cache=cache,
        )
        return plan.transport(tuple(plan.groups(progress=progress)))


class Plan:
    """An alignment that has been checked and can be run group by group; arguments as for `align`.

    Args:
        found: what `jcrosslora.lineage.find_structure` found of the pair, if it has been asked.

    Attributes:
        pairing: which module feeds which, over all modules of the target.
        probes: text for methods that run the bases; may be set until the groups are asked for.
    """

    def __init__(
        self,
        source: BaseModel,
        target: BaseModel,
        *,
        method: str,
        rank: int | None,
        depth: Depth,
        seed: int,
        sources: Collection[str] | None = None,
        probes: Probes | None = None,
        whitening: float = 0.0,
        cache: Cache | None = None,
        found: tuple[Structure | None, str] | None = None,
    ) -> None:
        self.source, self.target, self.method, self.seed = source, target, get_method(method), seed
        if self.method.draws:
            from jcrosslora.evidence.probes.start_words import check_seed

            check_seed(seed)  # JAX would take the lower 32 bits of a larger one
        self._structure: Structure | None = None
        if self.method.selects:
            self._structure, depth = find_selection(source, target, depth, found)
        # Which layers are alike is known when both bases have run; which shapes meet is the same for any map.
        self.pairing = pair_modules(source.modules, target.modules, "proportional" if depth == SIMILAR else depth)
        self._sources = sources
        self._depth = depth if isinstance(depth, str) else ",".join("-" if i is None else str(i) for i in depth)
        self._pairs = wanted_pairs(self.pairing, sources)
        check_shapes(self.method, source, target, self._pairs)
        self.rank = check_rank(rank, self.method, source, target, self._pairs)
        self.probes = probes
        self.whitening = check_whitening(whitening, self.method)
        if hosts.count() > 1:
            self._share(cache)
        kept = self.method.cuts or self.method.activations or self.method.embeddings or self._depth == SIMILAR
        self._cache = cache
        self._kept = PairCache(cache, source, target) if cache is not None and kept else None
        self._tokens, self._no_vocabulary = self._count_tokens()
        if self.method.embeddings and not self._tokens:
            reason = self._no_vocabulary
            msg = f"method {method} needs tokens that both bases have: {reason}; use another method"
            raise MethodError(msg)
        self._svds: list[str] = []  # what each matrix was decomposed by, as the groups are made

    @property
    def runs_bases(self) -> bool:
        """Whether both bases have to run on probe texts, for the method or for the depth map."""
        return self.method.runs_bases or self._depth == SIMILAR

    @property
    def reads_probes(self) -> bool:
        """Whether the maps or the depth map are made from probe texts."""
        return self.method.activations or self._depth == SIMILAR

    def groups(self, *, progress: bool = False) -> Iterator[TransportGroup]:
        """Align the modules, a group of equal shapes and bounded size at a time; each is forgotten once yielded."""
        self._svds = []
        batches = self._batches(progress) if self.reads_probes else []
        if self._depth == SIMILAR:
            self._pair_similar(batches, progress)

        @lru_cache  # for all groups that are not kept, when the first of them is met
        def common() -> tuple[CrossMoments | None, dict[str, HeadMatch]]:
            return self._moments(batches, progress) if self.method.activations else None, self._heads()

        kept, chunks = self._kept_groups(), list(self.chunks())
        found = kept.find(chunks) if kept is not None and hosts.is_first() else itertools.repeat(None)
        background = self._cache.in_background() if self._cache is not None else nullcontext()
        with background, track(len(self._pairs), "align", "modules", show=progress) as bar:
            for (pairs, group), stacks in self._read_ahead(zip(chunks, found, strict=False)):
                if stacks is None:
                    group = _sent(pairs, group)
                else:
                    group = _gathered(pairs, self._align(tuple(hosts.own_part(pairs)), stacks, *common()))
                    if kept is not None:
                        kept.keep(group)
                stacks = None  # while the next but one are read
                self._svds += group.kernels
                yield group
                bar.update(len(pairs))

    def transport(self, groups: tuple[TransportGroup, ...]) -> Transport:
        """Put groups together with the record of how they were made."""
        return Transport(
            groups=groups,
            recipe=self.recipe,
            source=describe_base(self.source),
            target=describe_base(self.target),
            pairing=self.pairing,
            warnings=self.warnings,
        )

    @property
    def recipe(self) -> AlignRecipe:
        """The settings, with defaults and outcomes filled in."""
        signs = "not needed" if not self.method.needs_sign_anchor else "vocabulary" if self._tokens else "rule"
        probes = self.probes if self.runs_bases else None
        return AlignRecipe(
            method=self.method.name,
            rank=self.rank,
            depth=self._depth,
            seed=self.seed,
            signs=signs,
            shared_tokens=self._tokens,
            probes="none" if probes is None else probes.describe(),
            probe_text=None if probes is None else probes.path,
            probe_count=len(probes.texts) if probes is not None and probes.path is None else None,
            whitening=self.whitening,
            svd=describe_kernels(self._svds) if self.method.decomposes else "not needed",
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know before looking at any number."""
        found = []
        if self.method.needs_sign_anchor and not self._tokens:
            found.append(
                f"the signs of the singular vectors are not anchored ({self._no_vocabulary}); they follow a rule that "
                "depends on the basis, so the moved update is one of many equally valid ones"
            )
        if any("ConditionalGeneration" in str(name) for name in self.target.config.get("architectures") or ()):
            found.append(
                "the target is a multimodal checkpoint: the adapter's names are those of its text model alone; load "
                "it on that, not on the whole"
            )
        return tuple(found)

    def chunks(self) -> Iterator[tuple[Pair, ...]]:
        """The pairs that are aligned together: of equal shapes, and of a bounded size."""

        def key(pair: Pair) -> tuple[object, ...]:
            shapes = self.source.modules[pair.source].shape, self.target.modules[pair.target].shape
            heads = head_counts(self.source, self.target, pair.role) if self.method.embeddings else None
            return *shapes, _reads(pair), heads

        def size(pair: Pair) -> int:
            return _bytes(self.source, pair.source) + _bytes(self.target, pair.target)

        yield from map(tuple, bounded_groups(self._pairs, key, size))

    def _share(self, cache: Cache | None) -> None:
        """Before several processes work on this together: see that they can, and mean the same."""
        if self.runs_bases:
            what = f"method {self.method.name}" if self.method.runs_bases else f"the depth map {SIMILAR}"
            msg = (
                f"{what} runs the bases on text, which several processes do not do together; name a method that looks "
                "at weights alone, such as cross-lora, or use one process"
            )
            raise MethodError(msg)
        stated = [
            [name, module.shape, module.tensor, module.rows]
            for base in (self.source, self.target)
            for name, module in base.modules.items()
        ]
        stated += [[file.stat().st_size for base in (self.source, self.target) for file in base.store.files]]
        settings = self.method.name, self.rank, self._depth, self.seed, self.whitening
        found = hosts.exchange("work", digest_of(settings, stated, self._pairs))
        if len(set(found)) > 1:
            msg = "the processes were not given the same bases, adapter and settings; start all of them alike"
            raise HostError(msg)
        digests = hosts.shared(None if cache is None else cache.digests)
        for base in (self.source, self.target):
            base.digest(digests)

    def _count_tokens(self) -> tuple[int, str]:
        """How many tokens both bases have, as far as the method asks for it; or 0 and why."""
        if not (self.method.needs_sign_anchor or self.method.embeddings):
            return 0, "not needed"
        count = None if self._kept is None else self._kept.shared_tokens()
        if count is not None:
            return count, ""
        vocabulary, reason = self._shared
        return (0, reason) if vocabulary is None else (vocabulary.count, "")

    @cached_property
    def _shared(self) -> tuple[Vocabulary | None, str]:
        found = None if self._kept is None else self._kept.vocabulary()
        if found is not None:
            return found, ""
        vocabulary, reason = shared_vocabulary(self.source, self.target)
        if self._kept is not None and vocabulary is not None:
            self._kept.keep_vocabulary(vocabulary)
        return vocabulary, reason

    @cached_property
    def _vocabulary(self) -> Vocabulary | None:
        """What both bases have in common, with the map of the stream where the method asks for it."""
        vocabulary = self._shared[0] if self._tokens else None
        if vocabulary is None or not self.method.embeddings:
            return vocabulary
        return dataclasses.replace(vocabulary, stream=embedding_map(vocabulary))

    def _kept_groups(self) -> GroupCache | None:
        """Where this transport's groups are kept; nowhere for maps that are made faster than they are read."""
        if self._kept is None or not (self.method.cuts or self.method.activations or self.method.embeddings):
            return None
        probes = self.probes.digest() if self.method.activations and self.probes is not None else None
        return self._kept.transport(self.method, self.rank, self.seed, self.whitening, probes, self._pairs)

    def _pair_similar(self, batches: list[ProbeBatch], progress: bool) -> None:
        """Replace the pairing by that of the layers that are alike."""
        from jcrosslora.alignment.layer_similarity import layer_similarity, ordered_layers

        def find() -> Sequence[int | None]:
            return ordered_layers(layer_similarity(self.source, self.target, batches, progress=progress))

        assert self.probes is not None
        layers = find() if self._kept is None else self._kept.layers(self.probes.digest(), find)
        pairing = pair_modules(self.source.modules, self.target.modules, layers)
        self.pairing = dataclasses.replace(pairing, depth_map=SIMILAR)
        self._pairs = wanted_pairs(self.pairing, self._sources)

    def _batches(self, progress: bool) -> list[ProbeBatch]:
        self.probes, batches = batch_probes(self.source, self.target, self.probes, seed=self.seed, progress=progress)
        return batches

    def _moments(self, batches: list[ProbeBatch], progress: bool) -> CrossMoments:
        from jcrosslora.evidence.moments import cross_moments

        roles = {pair.role for pair in self._pairs}
        layers, grams = self.pairing.layers, self.whitening > 0
        return cross_moments(self.source, self.target, batches, layers, roles, grams=grams, progress=progress)

    def _heads(self) -> dict[str, HeadMatch]:
        if self._vocabulary is None or self._vocabulary.stream is None:
            return {}
        return match_heads(self.source, self.target, self._pairs, self._vocabulary.stream)

    def _read_ahead(self, chunks: Iterable[_Chunk]) -> Iterator[tuple[_Chunk, tuple[jax.Array, jax.Array] | None]]:
        """Each chunk, with the weights of both sides of this process's part of it where it has to be aligned.

        Those of a chunk are read and put on the devices while the one before is aligned.
        """

        def read(pairs: list[Pair]) -> tuple[jax.Array, jax.Array]:
            src = load_stack(self.source, [pair.source for pair in pairs])
            return src, load_stack(self.target, [pair.target for pair in pairs])

        waiting: deque[tuple[_Chunk, Future[tuple[jax.Array, jax.Array]] | None]] = deque()
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
        self,
        pairs: tuple[Pair, ...],
        stacks: tuple[jax.Array, jax.Array],
        moments: CrossMoments | None,
        heads: dict[str, HeadMatch],
    ) -> TransportGroup:
        shapes = self.source.modules[pairs[0].source].shape, self.target.modules[pairs[0].target].shape
        rank = min(self.rank, *shapes[0], *shapes[1])
        factors = (None, None) if self._kept is None else (self._kept.source, self._kept.target)
        src, kernels_src = self._side(self.source, [pair.source for pair in pairs], stacks[0], rank, factors[0])
        tgt, kernels_tgt = self._side(self.target, [pair.target for pair in pairs], stacks[1], rank, factors[1])
        keys = self._keys(pairs, src.weight.shape[0]) if self.method.draws else None
        seen = None
        if moments is not None:
            layers = [self.target.modules[pair.target].layer for pair in pairs]
            seen = stack_activations(moments, [pair.role for pair in pairs], layers, src.weight.shape[0])
        evidence = Evidence(
            src, tgt, self._vocabulary, seen, keys, reads=_reads(pairs[0]), rank=rank, whitening=self.whitening
        )
        if pairs[0].target in heads:
            matches = [heads[pair.target] for pair in pairs]
            matches += matches[-1:] * (src.weight.shape[0] - len(pairs))
            evidence = dataclasses.replace(evidence, heads=jax.tree.map(lambda *leaves: jnp.stack(leaves), *matches))
        if self._structure is not None:
            names = [pair.target for pair in pairs]
            selection = select_rows(self._structure, self.target, names, src.weight.shape[0])
            evidence = dataclasses.replace(evidence, selection=selection)
        fit, agreement = _fit_stack(evidence, self.method, mesh_of(src.weight))
        terms, agreement = jax.tree.map(lambda x: x[: len(pairs)], (fit.terms, agreement))
        # Waiting here keeps one group in flight: it bounds memory, and on a CPU two programs that both call LAPACK
        # take the cores from each other (measured: 6 times slower).
        return jax.block_until_ready(TransportGroup(terms, agreement, pairs, kernels_src + kernels_tgt))

    @cached_property
    def _keys_of_targets(self) -> dict[str, np.ndarray]:
        """A key for each pair, from the target's name: the same whatever else is aligned beside it."""
        numbers = np.array([zlib.crc32(pair.target.encode()) for pair in self._pairs], np.uint32)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(self.seed)))(numbers)
        names = [pair.target for pair in self._pairs]
        return dict(zip(names, np.asarray(jax.random.key_data(keys)), strict=True))

    def _keys(self, pairs: tuple[Pair, ...], count: int) -> jax.Array:
        keys = [self._keys_of_targets[pair.target] for pair in pairs]
        keys += keys[-1:] * (count - len(pairs))
        return jax.random.wrap_key_data(jnp.asarray(np.stack(keys)))

    def _side(
        self, base: BaseModel, names: list[str], stack: jax.Array, rank: int, factors: FactorCache | None
    ) -> tuple[Side, tuple[str, ...]]:
        """The evidence of one side of a group, and what each of its matrices was decomposed by."""
        gains = [base.residual_gain(name) for name in names]
        gains += gains[-1:] * (stack.shape[0] - len(names))
        svd, kernels, vectors = None, (), self.method.vectors
        if self.method.decomposes and factors is None:
            svd, kernels = decompose(stack, rank, vectors=vectors)
        elif self.method.decomposes and factors is not None:
            load = partial(load_stack, base)
            svd, kernels = factors.decompose(names, rank, vectors=vectors, stack=stack, load=load)
        return Side(stack, spread(np.stack(gains)), svd), kernels[: len(names)]


@partial(jax.jit, static_argnames=("method", "mesh"))
def _fit_stack(evidence: Evidence, method: Method, mesh: Mesh | None) -> tuple[Fit, Agreement]:
    def one(evidence: Evidence, vocabulary: Vocabulary | None) -> tuple[Fit, Agreement]:
        evidence = dataclasses.replace(evidence, vocabulary=vocabulary)
        fit = method.fit(evidence)
        return fit, measure(evidence, fit, by_coordinates=method.measure == "weight cosine")

    return over_layers(one, mesh, dataclasses.replace(evidence, vocabulary=None), evidence.vocabulary)


def _gathered(pairs: tuple[Pair, ...], own: TransportGroup) -> TransportGroup:
    """The group of all pairs, from the parts that the processes have aligned."""
    if hosts.count() == 1:
        return own
    arrays = {name: np.asarray(array) for name, array in arrays_of(own).items()}
    sides = (own.kernels[: len(own.pairs)], own.kernels[len(own.pairs) :]) if own.kernels else ()
    arrays, kernels = hosts.gather(f"maps of {pairs[0].target}", arrays, sides, len(pairs))
    return group_of(pairs, arrays, facts_of(own) | {"kernels": [name for side in kernels for name in side]})


def _sent(pairs: tuple[Pair, ...], kept: TransportGroup | None) -> TransportGroup:
    """The group that the first process has found in its cache."""
    if hosts.count() == 1:
        assert kept is not None
        return kept
    facts, own = ({}, {}) if kept is None else (facts_of(kept), arrays_of(kept))
    arrays = hosts.send({name: np.asarray(array) for name, array in own.items()})
    return group_of(pairs, arrays, hosts.from_first("facts", lambda: facts))


def _reads(pair: Pair) -> bool:
    return pair.role in READERS


def _bytes(base: BaseModel, name: str) -> int:
    rows, columns = base.modules[name].shape
    return 4 * rows * columns
