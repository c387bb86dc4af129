"""The request of an alignment for evidence, the stacks of weights that evidence is added to, and what a provider is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from jcrosslora.maps.evidence.base_pair import BasePair
from jcrosslora.maps.evidence.records import Evidence, EvidenceKind
from jcrosslora.relation.pairing import Pair
from jcrosslora.utils.cost import Cost

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import ProbeBatch, Probes

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class EvidenceRequest:
    """The evidence that a method needs for some pairs of modules.

    Attributes:
        method: name of the method, for errors.
        kinds: the kinds of evidence that it needs.
        layers: for each target layer the source layer that feeds it, or None.
        rank: R, the requested truncation rank; a module uses at most its short side.
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
        source: (L', O_src, I_src), float32; L' is L rounded up to a multiple of the device count, and the surplus
            repeats the last module.
        target: (L', O_tgt, I_tgt), the same of the target.
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


AddEvidence = Callable[[Evidence, ModuleStack], Evidence]
"""Adds one kind of evidence for a stack of modules."""


@dataclass(frozen=True)
class Provider:
    """How one kind of evidence is collected.

    Attributes:
        collect: collects what all modules share, and returns a function that adds the evidence of a stack of modules.
        is_costly: whether maps made from it take longer to compute than to read from a cache.
        reads_tokenizers: whether the evidence depends on the tokenizers as well as on the weights.
        check: refuses a request that cannot be met, before anything is computed.
        cost: counts what takes time with a number of probe texts, including the maps that are made from the evidence;
            None where it is not known.
        cache_key: what the evidence depends on besides the bases, the rank and the modules, as a JSON value.
    """

    collect: Callable[[EvidenceRequest], AddEvidence]
    is_costly: bool = False
    reads_tokenizers: bool = False
    check: Callable[[EvidenceRequest], None] = lambda _: None
    cost: Callable[[EvidenceRequest, int], Cost | None] = lambda *_: Cost()
    cache_key: Callable[[EvidenceRequest], Any] = lambda _: None
