"""The request of an alignment to the evidence providers, and the stacks of weights that they add evidence to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import jax

from jcrosslora.maps.evidence.base_pair import BasePair
from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.relation.pairing import Pair

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import ProbeBatch, Probes

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class EvidenceRequest:
    """The evidence that a method needs for some pairs of modules.

    Attributes:
        pair: the two bases.
        method: name of the method, for errors.
        kinds: the kinds of evidence that it needs.
        modules: the pairs of modules.
        layers: for each target layer the source layer that feeds it, or None.
        rank: R, the truncation rank asked for; a module uses at most its short side.
        single_vectors: whether single singular vectors matter, or only the subspace that they span.
        seed: for everything that is drawn at random.
        probes: texts that both bases are run on; None before they are known, and where they are not needed.
        batches: the same texts, tokenised for both bases.
    """

    pair: BasePair
    method: str
    kinds: frozenset[EvidenceKind]
    modules: tuple[Pair, ...]
    layers: tuple[int | None, ...]
    rank: int
    single_vectors: bool = False
    seed: int = 0
    probes: Probes | None = None
    batches: Sequence[ProbeBatch] = ()

    @property
    def shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """The shapes (O, I) of the source's and the target's module of each pair."""
        source, target = self.pair.source.modules, self.pair.target.modules
        return [(source[one.source].shape, target[one.target].shape) for one in self.modules]


def pairs_as_json(pairs: Sequence[Pair]) -> list[tuple[str, str, str]]:
    """Return pairs of modules as JSON values, for cache keys."""
    return [(pair.target, pair.source, pair.role) for pair in pairs]


@dataclass(frozen=True, eq=False)
class ModuleStack:
    """The weights of L pairs of modules of equal shapes, on the devices.

    Attributes:
        pairs: the L pairs.
        source: (L', O_src, I_src), float32; L' is L rounded up to a multiple of the device count, and the surplus
            repeats the last module.
        target: (L', O_tgt, I_tgt), likewise.
        rank: R for these shapes.
        kernels: the kernel that decomposed each matrix, the source's first; filled by the provider of singular vectors.
    """

    pairs: tuple[Pair, ...]
    source: jax.Array
    target: jax.Array
    rank: int
    kernels: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Return L', the length of the leading axis."""
        return self.source.shape[0]

    def filled(self, rows: list[T]) -> list[T]:
        """Extend L rows to L' by repeating the last one."""
        return rows + rows[-1:] * (self.count - len(rows))
