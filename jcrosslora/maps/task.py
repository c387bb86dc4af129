"""A checked alignment: paired modules, needs of the method, and its record for reports."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from jcrosslora.adapter import Carried
from jcrosslora.architectures.blocks import LINEARS
from jcrosslora.checkpoint import describe_base
from jcrosslora.checkpoint.weight_stacks import bounded_groups
from jcrosslora.errors import PairingError
from jcrosslora.evaluate.probes import ProbeBatch, Probes
from jcrosslora.linalg import describe_kernels
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import Evidence, EvidenceKind
from jcrosslora.maps.method import Method
from jcrosslora.maps.transport import AlignRecipe, OpenedBases, Transport, TransportGroup
from jcrosslora.relation import has_other_gains
from jcrosslora.relation.bases import compare_token_names
from jcrosslora.relation.pairing import Pair, Pairing
from jcrosslora.relation.wording import OTHER_GAINS

T = TypeVar("T")
Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class AlignmentTask:
    """An alignment of two bases by one method.

    Attributes:
        method: of the transfer; its `map_method` chooses the maps, and there are none without one.
        depth: the requested depth map, as reports state it.
        sources: the source modules that adapters have; None is all.
        pairing: which module feeds which, over all modules of the target.
        rank: R, the truncation rank; a module uses at most its short side.
        probes: text that both bases are run on; None if there is none yet.
        batches: the same text as both bases read it.
    """

    pair: BasePair
    method: Method
    depth: str
    seed: int
    sources: frozenset[str] | None
    pairing: Pairing
    rank: int = 0
    probes: Probes | None = None
    batches: tuple[ProbeBatch, ...] = ()

    @property
    def modules(self) -> tuple[Pair, ...]:
        """The pairs that the wanted source modules feed, for which maps are made; none for a method without maps.

        Raises PairingError if the source modules feed none.
        """
        if self.method.map_method is None:
            return ()
        if self.sources is None:
            return self.pairing.pairs
        pairs = tuple(pair for pair in self.pairing.pairs if pair.source in self.sources)
        if not pairs:
            msg = f"none of the adapter's {len(self.sources)} modules feeds a module of the target under depth map "
            raise PairingError(msg + f"{self.pairing.depth_map!r}; choose another with --depth")
        return pairs

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

    def transport(self, groups: tuple[TransportGroup, ...], kernels: list[str]) -> Transport:
        """Put groups together with the record of how they were made.

        `groups` may be left out if they have been used already; `kernels` are what the matrices of all groups were
        decomposed by.
        """
        return Transport(
            groups=groups,
            method=self.method,
            recipe=self._recipe(kernels),
            source=describe_base(self.pair.source),
            target=describe_base(self.pair.target),
            pairing=self.pairing,
            bases=OpenedBases(self.pair.source, self.pair.target),
            warnings=tuple(self._warnings()),
        )

    def _recipe(self, kernels: list[str]) -> AlignRecipe:
        """Return the settings with their outcomes filled in."""
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
            svd=describe_kernels(kernels) if EvidenceKind.SINGULAR_VECTORS in requires else "not needed",
        )

    def _warnings(self) -> Iterator[str]:
        """Yield warnings to read before any figure."""
        source, target = self.pair
        yield from (f"source base: {note}" for note in source.notes)
        yield from (f"target base: {note}" for note in target.notes)
        if EvidenceKind.SHARED_VOCABULARY in self.method.requires and not self.pair.shared_tokens[0]:
            yield (
                f"the signs of the singular vectors are not anchored ({self.pair.shared_tokens[1]}); they follow a "
                "rule that depends on the basis, so the moved update is one of many equally valid ones"
            )
        follows = EvidenceKind.CHANNEL_SCALES in self.method.requires
        if follows and has_other_gains(source, target, self.pair.channels):
            yield f"{OTHER_GAINS}; the update may do something else on the target: check it with `jcrosslora evaluate`"
        names = compare_token_names(source, target) if Carried.TOKENS in self.method.carries else None
        if names is not None and names.contradict:
            yield (
                f"{names.sentence}; rows of embedding and head are carried over by id, and one of the two tokenizers "
                "does not belong to its base: check both"
            )
        if target.wrapper is not None:
            yield (
                f"the adapter's names are those of the target's class, {target.wrapper.architecture}; on its text "
                "model alone it would do nothing: write it for that with `jcrosslora export --base`"
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
