"""An alignment that has been checked and not yet run: which modules are paired, and what the method needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jcrosslora.adapter import Carried
from jcrosslora.architectures.blocks import READERS
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import describe_base
from jcrosslora.checkpoint.weight_stacks import bounded_groups
from jcrosslora.errors import MethodError, PairingError, UsageError
from jcrosslora.linalg import describe_kernels
from jcrosslora.maps.alignment.transport import AlignRecipe, Transport, TransportGroup
from jcrosslora.maps.evidence.base_pair import BasePair
from jcrosslora.maps.evidence.heads import head_counts
from jcrosslora.maps.evidence.providers import providers_of, selected_layers
from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.evidence.request import EvidenceRequest
from jcrosslora.maps.method import DEFAULT_SVD_RANK, Method
from jcrosslora.relation.pairing import SIMILAR, Depth, Pair, Pairing, pair_modules
from jcrosslora.relation.weight_similarity import compare_token_names

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import ProbeBatch, Probes


@dataclass(frozen=True, eq=False)
class AlignmentTask:
    """An alignment of two bases by one method.

    Attributes:
        method: of the transfer; its `start` chooses the maps, and there are none without one.
        depth: the requested depth map, as reports state it.
        sources: the source modules that adapters have; None is all.
        pairing: which module feeds which, over all modules of the target. With the depth map "similar" it
            follows from the shapes alone until both bases have run.
        rank: R, the truncation rank.
        probes: text that both bases are run on; None where there is none yet.
        batches: the same text as both bases read it.
    """

    pair: BasePair
    method: Method
    depth: str
    seed: int
    sources: frozenset[str] | None
    pairing: Pairing
    rank: int
    probes: Probes | None = None
    batches: tuple[ProbeBatch, ...] = ()

    @property
    def modules(self) -> tuple[Pair, ...]:
        """The pairs that the wanted source modules feed, for which maps are made; none for a method without maps."""
        return () if self.method.start is None else _wanted(self.pairing, self.sources)

    @property
    def runs_bases(self) -> bool:
        """Whether both bases have to run on text, for the method or for the depth map."""
        return self.method.runs_bases or self.depth == SIMILAR

    @property
    def reads_probes(self) -> bool:
        """Whether the maps or the depth map are made from probe texts."""
        return EvidenceKind.ACTIVATIONS in self.method.requires or self.depth == SIMILAR

    @property
    def request(self) -> EvidenceRequest:
        """The evidence that the maps need."""
        start = self.method.start
        return EvidenceRequest(
            pair=self.pair,
            method=(start or self.method).name,
            kinds=frozenset() if start is None else frozenset(start.requires),
            modules=self.modules,
            layers=self.pairing.layers,
            rank=self.rank,
            single_vectors=start is not None and start.single_vectors,
            seed=self.seed,
            probes=self.probes,
            batches=self.batches,
        )

    def chunks(self) -> Iterator[tuple[Pair, ...]]:
        """Yield the pairs that are aligned together: of equal shapes, and of a bounded size."""
        source, target = self.pair.source, self.pair.target
        by_heads = EvidenceKind.EMBEDDING_MAP in self.method.requires

        def key(pair: Pair) -> tuple[object, ...]:
            shapes = source.modules[pair.source].shape, target.modules[pair.target].shape
            return *shapes, reads_stream(pair), head_counts(source, target, pair.role) if by_heads else None

        def size(pair: Pair) -> int:
            return _bytes(source, pair.source) + _bytes(target, pair.target)

        yield from map(tuple, bounded_groups(self.modules, key, size))

    def transport(self, groups: tuple[TransportGroup, ...], kernels: list[str]) -> Transport:
        """Put groups together with the record of how they were made.

        `groups` may be left out where they have been used already; `kernels` are what the matrices of all groups were
        decomposed by.
        """
        return Transport(
            groups=groups,
            method=self.method,
            recipe=self.recipe(kernels),
            source=describe_base(self.pair.source),
            target=describe_base(self.pair.target),
            pairing=self.pairing,
            bases=(self.pair.source, self.pair.target),
            warnings=self.warnings(),
        )

    def recipe(self, kernels: list[str]) -> AlignRecipe:
        """Return the settings with their outcomes filled in."""
        anchors = EvidenceKind.SHARED_VOCABULARY in self.method.requires
        tokens = self.pair.shared_tokens[0] if anchors or EvidenceKind.EMBEDDING_MAP in self.method.requires else 0
        probes = self.probes if self.runs_bases else None
        decomposes = EvidenceKind.SINGULAR_VECTORS in self.method.requires
        return AlignRecipe(
            method=self.method.spec(),
            settings=self.method.settings() | ({"svd_rank": self.rank} if self.method.truncates else {}),
            depth=self.depth,
            seed=self.seed,
            signs="not needed" if not anchors else "vocabulary" if tokens else "rule",
            shared_tokens=tokens,
            probes="none" if probes is None else probes.describe(),
            probe_text=None if probes is None else probes.path,
            probe_count=len(probes.texts) if probes is not None and probes.seed is not None else None,
            svd=describe_kernels(kernels) if decomposes else "not needed",
        )

    def warnings(self) -> tuple[str, ...]:
        """Return what the user has to know before looking at any number."""
        sides = {"source": self.pair.source, "target": self.pair.target}
        found = [f"{side} base: {note}" for side, base in sides.items() for note in base.notes]
        if EvidenceKind.SHARED_VOCABULARY in self.method.requires and not self.pair.shared_tokens[0]:
            found.append(
                f"the signs of the singular vectors are not anchored ({self.pair.shared_tokens[1]}); they follow a "
                "rule that depends on the basis, so the moved update is one of many equally valid ones"
            )
        names = compare_token_names(*sides.values()) if Carried.TOKENS in self.method.carries else None
        if names is not None and names.contradict:
            found.append(
                f"{names.sentence}; rows of embedding and head are carried over by id, and one of the two tokenizers "
                "does not belong to its base: check both"
            )
        if self.pair.target.wrapper is not None:
            found.append(
                f"the adapter's names are those of the target's class, {self.pair.target.wrapper.architecture}; on its "
                "text model alone it would do nothing: write it for that with `jcrosslora export --base`"
            )
        return tuple(found)

    def with_layers(self, layers: tuple[int | None, ...]) -> AlignmentTask:
        """Return the task with the layers that running both bases has paired."""
        pairing = pair_modules(self.pair.source.modules, self.pair.target.modules, layers)
        return dataclasses.replace(self, pairing=dataclasses.replace(pairing, depth_map=SIMILAR))


def plan_alignment(
    pair: BasePair,
    method: Method,
    *,
    depth: Depth = "proportional",
    seed: int = 0,
    sources: Collection[str] | None = None,
) -> AlignmentTask:
    """Check an alignment; nothing is computed but what decides whether it can be done.

    `sources` are the source modules that an adapter has, whose pairs alone are aligned; None is all. `depth` is
    explained at `jcrosslora.relation.pairing.pair_modules`.

    Raises:
        MethodError: the method cannot be used on these bases.
        PairingError: the modules cannot be paired as asked.
        UsageError: a truncation rank out of range, or a seed outside 0 to 2^32 - 1 for a method that draws.
    """
    if EvidenceKind.SELECTION in method.requires:
        depth = selected_layers(pair.structure, depth)
    # Which layers are alike is known when both bases have run; which shapes meet is the same for any map.
    by_shape = "proportional" if depth == SIMILAR else depth
    pairing = pair_modules(pair.source.modules, pair.target.modules, by_shape)
    modules = () if method.start is None else _wanted(pairing, sources)
    _check_shapes(method, pair, modules)
    stated = depth if isinstance(depth, str) else ",".join("-" if layer is None else str(layer) for layer in depth)
    task = AlignmentTask(
        pair=pair,
        method=method,
        depth=stated,
        seed=seed,
        sources=None if sources is None else frozenset(sources),
        pairing=pairing,
        rank=_checked_rank(method, pair, modules),
    )
    for provider in providers_of(method.requires):
        provider.check(task.request)
    return task


def reads_stream(pair: Pair) -> bool:
    """Whether a module reads the residual stream (q, k, v, gate, up); others write it (o, down), or read a latent."""
    return pair.role in READERS


def _wanted(pairing: Pairing, sources: Collection[str] | None) -> tuple[Pair, ...]:
    if sources is None:
        return pairing.pairs
    pairs = tuple(pair for pair in pairing.pairs if pair.source in sources)
    if not pairs:
        msg = (
            f"none of the adapter's {len(sources)} modules feeds a module of the target under depth map "
            f"{pairing.depth_map!r}; choose another with --depth"
        )
        raise PairingError(msg)
    return pairs


def _check_shapes(method: Method, bases: BasePair, modules: tuple[Pair, ...]) -> None:
    if method.start is None or not method.start.equal_shapes:
        return
    for pair in modules:
        src, tgt = bases.source.modules[pair.source].shape, bases.target.modules[pair.target].shape
        if src != tgt:
            msg = (
                f"method {method.name} needs equal shapes, but {pair.source} is {src[0]} x {src[1]} and "
                f"{pair.target} is {tgt[0]} x {tgt[1]}; use cross-lora or another method that maps between widths"
            )
            raise MethodError(msg)


def _checked_rank(method: Method, bases: BasePair, modules: tuple[Pair, ...]) -> int:
    """Return the truncation rank: the method's own, or its default where the modules are smaller; 0 without maps."""
    if not modules:
        return 0
    sides = [(bases.source.modules[pair.source].shape, bases.target.modules[pair.target].shape) for pair in modules]
    widest = max(min(*src, *tgt) for src, tgt in sides)
    rank = getattr(method, "svd_rank", DEFAULT_SVD_RANK)
    if rank == getattr(type(method), "svd_rank", DEFAULT_SVD_RANK):
        return min(rank, widest)
    if not 1 <= rank <= widest:
        msg = f"svd_rank {rank} is out of range; these bases allow 1 to {widest}, their widest modules' short side"
        raise UsageError(msg)
    return rank


def _bytes(base: BaseModel, name: str) -> int:
    rows, columns = base.modules[name].shape
    return 4 * rows * columns
