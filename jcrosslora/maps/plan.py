"""The plan of a transfer: what is moved, between which bases, by which method and through which pairs of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jcrosslora.adapter import Adapter, Carried
from jcrosslora.architectures.blocks import LINEARS
from jcrosslora.checkpoint import BaseInfo, BaseModel, describe_base
from jcrosslora.checkpoint.weight_stacks import bounded_groups
from jcrosslora.errors import MethodError, PairingError
from jcrosslora.evaluate.probes import ProbeBatch, Probes
from jcrosslora.linalg import describe_kernels
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import Evidence, EvidenceKind
from jcrosslora.maps.shifted import Calibration
from jcrosslora.maps.transport import AlignRecipe, OpenedBases, Transport, TransportGroup
from jcrosslora.relation import has_other_gains
from jcrosslora.relation.bases import compare_token_names
from jcrosslora.relation.pairing import Pair, Pairing
from jcrosslora.relation.wording import OTHER_GAINS
from jcrosslora.text import Completion, Prompt
from jcrosslora.utils.cache import Cache

if TYPE_CHECKING:
    from jcrosslora.decoder import LoadedBases
    from jcrosslora.distill.sources import QueriedSource
    from jcrosslora.maps.method import Method, Moved

T = TypeVar("T")
Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked move of an adapter. Nothing is computed yet, and the maps are made when `mapped` is read.

    Attributes:
        bases: the source and the target with the facts that stages share; None if the source can only be queried.
        adapter: the source adapter, with fused matrices split, without the changes that do not move. It is empty if the
            source can only be queried, and for the alignment that several adapters share.
        queried: a source that can only be queried, with its adapter; None if the bases are read.
        depth: the requested depth map, as reports state it.
        sources: the source modules that adapters have; None is all.
        pairing: which module feeds which, over all modules of the target; None if nothing is mapped.
        rank: R, the truncation rank; a module uses at most its short side.
        calibrate: "frobenius" restores the norm of each update after the maps; None leaves it to the method.
        scale: factor of each mapped update.
        given: the user's text; None if there is none.
        probes: the text that both bases are run on; None if there is none yet.
        batches: the same text as both bases read it.
        probe_count: how many texts the source writes if some are needed and none are given.
        groups: the maps, if they are made already.
        reason: why `auto` chose the method; None if the user named it.
        doubts: what speaks against the source as the base of the adapter, one sentence each.
        shared: results that hold for all adapters of the pair; a method may add some.
        states: folder in which a long fit keeps its states, from which it continues after a stop; None keeps none.
        loaded: gives the weights of both bases, divided over devices if one is too small; None if they do not run.
    """

    method: Method
    target: BaseModel
    adapter: Adapter
    bases: BasePair | None = None
    queried: QueriedSource | None = None
    depth: str = ""
    seed: int = 0
    sources: frozenset[str] | None = None
    pairing: Pairing | None = None
    rank: int = 0
    calibrate: Calibration | None = None
    scale: float = 1.0
    given: Probes | None = None
    probes: Probes | None = None
    batches: tuple[ProbeBatch, ...] = ()
    probe_count: int = 0
    groups: tuple[TransportGroup, ...] | None = None
    reason: str | None = None
    doubts: tuple[str, ...] = ()
    shared: dict[Any, Any] = field(default_factory=dict)
    states: Path | None = None
    loaded: LoadedBases | None = None

    @property
    def pair(self) -> BasePair:
        """Both bases; raise MethodError if the source can only be queried."""
        if self.bases is None:
            msg = f"method {self.method.name} needs the weights of the source, which can only be queried: use "
            raise MethodError(msg + "--method distill, or give the weights with --source")
        return self.bases

    @property
    def store(self) -> Cache | None:
        """The cache; None if none is used."""
        return None if self.bases is None else self.bases.store

    @property
    def source(self) -> BaseModel | QueriedSource:
        """The source: a base whose weights can be read, or a source that can only be queried."""
        return self.pair.source if self.queried is None else self.queried

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The user's texts or conversations; empty if the source writes its own."""
        return () if self.given is None else self.given.prompts or self.given.texts

    @property
    def examples(self) -> Sequence[Completion]:
        """The user's prompts with right answers."""
        return () if self.given is None else self.given.examples

    @property
    def text_count(self) -> int:
        """How many texts both bases are run on, if they are."""
        return (0 if self.given is None else len(set(self.given.texts))) or self.probe_count

    @cached_property
    def mapped(self) -> Moved | None:
        """The adapter after the maps of the method's `map_method`; None if it has none.

        Raises:
            PairingError: no update of the adapter is moved.
            CheckpointError: weights cannot be read or are not finite.
        """
        from jcrosslora.maps.shift import map_together

        return None if self.method.map_method is None else map_together([self], self)[0]

    @property
    def keeps_norm(self) -> bool:
        """Whether each update gets the norm that it had on the source after the maps, as that of a control does."""
        if self.calibrate is None:
            return self.method.map_method is not None and self.method.map_method.is_control
        return self.calibrate == "frobenius"

    @property
    def modules(self) -> tuple[Pair, ...]:
        """The pairs that the wanted source modules feed, for which maps are made; none for a method without maps.

        Raises PairingError if the source modules feed none.
        """
        if self.method.map_method is None or self.pairing is None:
            return ()
        if self.sources is None:
            return self.pairing.pairs
        pairs = tuple(pair for pair in self.pairing.pairs if pair.source in self.sources)
        if not pairs:
            msg = f"none of the adapter's {len(self.sources)} modules feeds a module of the target under depth map "
            raise PairingError(msg + f"{self.pairing.depth_map!r}; choose another with --depth")
        return pairs

    @property
    def layers(self) -> tuple[int | None, ...]:
        """For each target layer the source layer that feeds it."""
        return (None,) * self.target.dims.layers if self.pairing is None else self.pairing.layers

    @property
    def kinds(self) -> frozenset[EvidenceKind]:
        """The kinds of evidence that the maps need."""
        return frozenset() if self.method.map_method is None else self.method.map_method.requires

    @property
    def single_vectors(self) -> bool:
        """Whether single singular vectors matter, or only the subspace that they span."""
        return self.method.map_method is not None and self.method.map_method.single_vectors

    @property
    def reads_probes(self) -> bool:
        """Whether the maps are made from probe texts."""
        return EvidenceKind.ACTIVATIONS in self.method.requires

    def shapes(self, pair: Pair) -> tuple[Shape, Shape]:
        """Return the shapes (O, I) of the source's and the target's module of a pair."""
        return self.pair.source.modules[pair.source].shape, self.pair.target.modules[pair.target].shape

    def chunks(self) -> Iterator[tuple[Pair, ...]]:
        """Yield the pairs that are aligned together: of equal shapes, and of a bounded size."""

        def key(pair: Pair) -> tuple[object, ...]:
            return *self.shapes(pair), LINEARS[pair.role].stream

        def size(pair: Pair) -> int:
            return sum(4 * rows * columns for rows, columns in self.shapes(pair))

        yield from map(tuple, bounded_groups(self.modules, key, size))

    @property
    def source_info(self) -> BaseInfo:
        """Describe the source, as far as it is known."""
        if self.queried is None:
            return describe_base(self.pair.source)
        name, ref = self.queried.name, self.queried.ref
        return BaseInfo(name=name, ref=ref, revision=None, digest="", family="not read", shapes={})

    def transport(self, groups: tuple[TransportGroup, ...]) -> Transport:
        """Put the groups of an alignment together with the record of how they were made."""
        return Transport(
            groups=groups,
            method=self.method,
            recipe=self.recipe([kernel for group in groups for kernel in group.kernels]),
            source=self.source_info,
            target=describe_base(self.target),
            pairing=self.pairing,
            bases=OpenedBases(*self.pair),
            warnings=tuple(self.warnings()),
        )

    def recipe(self, kernels: Sequence[str] = ()) -> AlignRecipe:
        """Return the settings with their outcomes; `kernels` are those that decomposed the matrices of all groups."""
        requires = self.method.requires
        anchors = EvidenceKind.SHARED_VOCABULARY in requires
        tokens = self.pair.shared_tokens[0] if anchors else 0
        probes = self.probes if self.method.runs_bases else None
        return AlignRecipe(
            method=self.method.spec(),
            settings=self.method.settings() | ({"svd_rank": self.rank} if self.method.truncates else {}),
            depth=self.depth,
            seed=self.seed,
            signs="not needed" if not anchors else "vocabulary" if tokens else "rule",
            shared_tokens=tokens,
            probes="none" if probes is None else probes.describe(),
            prompts=None if probes is None else probes.path,
            examples=None if probes is None else probes.examples_path,
            example_count=0 if probes is None else len(probes.examples),
            probe_count=len(probes.texts) if probes is not None and probes.seed is not None else None,
            svd=describe_kernels(list(kernels)) if EvidenceKind.SINGULAR_VECTORS in requires else "not needed",
        )

    def warnings(self) -> Iterator[str]:
        """Yield warnings to read before any figure."""
        target = self.target
        if self.queried is None:
            yield from self._warnings_of_source(self.pair.source)
        yield from (f"target base: {note}" for note in target.notes)
        if target.wrapper is not None:
            yield (
                f"the adapter's names are those of the target's class, {target.wrapper.architecture}; on its text "
                "model alone it would do nothing: write it for that with `jcrosslora export --base`"
            )

    def _warnings_of_source(self, source: BaseModel) -> Iterator[str]:
        yield from (f"source base: {note}" for note in source.notes)
        if EvidenceKind.SHARED_VOCABULARY in self.method.requires and not self.pair.shared_tokens[0]:
            yield (
                f"the signs of the singular vectors are not anchored ({self.pair.shared_tokens[1]}); they follow a "
                "rule that depends on the basis, so the moved update is one of many equally valid ones"
            )
        follows = EvidenceKind.CHANNEL_SCALES in self.method.requires
        if follows and has_other_gains(source, self.target, self.pair.channels):
            yield f"{OTHER_GAINS}; the update may do something else on the target: check it with `jcrosslora evaluate`"
        names = compare_token_names(source, self.target) if Carried.TOKENS in self.method.carries else None
        if names is not None and names.contradict:
            yield (
                f"{names.sentence}; rows of embedding and head are carried over by id, and one of the two tokenizers "
                "does not belong to its base: check both"
            )


def pairs_as_json(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """Return pairs of modules as JSON values, for cache keys."""
    return [(pair.target, pair.source, pair.role) for pair in pairs]


@dataclass(frozen=True, eq=False)
class ModuleStack:
    """L pairs of modules of equal shapes, whose weights are stacked.

    Attributes:
        size: L', which is L rounded up to a multiple of the device count; the surplus repeats the last module.
        kernels: the kernel that decomposed each matrix, the source's first; filled by the provider of singular vectors.
    """

    pairs: tuple[Pair, ...]
    size: int
    kernels: list[str] = field(default_factory=list)

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Return the names of the source's and of the target's modules."""
        return [pair.source for pair in self.pairs], [pair.target for pair in self.pairs]

    def filled(self, rows: list[T]) -> list[T]:
        """Extend L rows to L' by repeating the last one."""
        return rows + rows[-1:] * (self.size - len(rows))


AddEvidence = Callable[[Evidence, ModuleStack], Evidence]
"""Adds one kind of evidence for a stack of modules."""
