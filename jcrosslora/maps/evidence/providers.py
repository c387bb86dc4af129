"""The evidence providers by kind. An alignment asks for kinds and knows no method."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from jcrosslora.maps.evidence.activations import ActivationProvider
from jcrosslora.maps.evidence.heads import EmbeddingMapProvider
from jcrosslora.maps.evidence.random_keys import RandomKeyProvider
from jcrosslora.maps.evidence.records import Evidence, EvidenceKind
from jcrosslora.maps.evidence.request import EvidenceRequest, ModuleStack
from jcrosslora.maps.evidence.selection import SelectionProvider
from jcrosslora.maps.evidence.singular_vectors import SingularVectorProvider
from jcrosslora.maps.evidence.vocabulary_provider import SharedVocabularyProvider
from jcrosslora.utils.cost import Cost

AddEvidence = Callable[[Evidence, ModuleStack], Evidence]
"""Adds one kind of evidence for a stack of modules."""


class EvidenceProvider(Protocol):
    """Collects one kind of evidence.

    Attributes:
        is_costly: whether maps made from it take longer to compute than to read from a cache.
        reads_tokenizers: whether the evidence depends on the tokenizers as well as on the weights.
    """

    is_costly: bool
    reads_tokenizers: bool

    def check(self, request: EvidenceRequest) -> None:
        """Refuse, before anything is computed, a request that cannot be met."""
        ...

    def cost(self, request: EvidenceRequest, texts: int) -> Cost | None:
        """Count what takes time, with so many probe texts, the maps that are made from the evidence included.

        None where it is not known.
        """
        ...

    def cache_key(self, request: EvidenceRequest) -> Any:
        """Return what the evidence depends on besides the bases, the rank and the modules, as a JSON value."""
        ...

    def collect(self, request: EvidenceRequest) -> AddEvidence:
        """Collect what all modules share, and return a function that adds the evidence of a stack of modules."""
        ...


PROVIDERS: dict[EvidenceKind, EvidenceProvider] = {
    EvidenceKind.SINGULAR_VECTORS: SingularVectorProvider(),
    EvidenceKind.SHARED_VOCABULARY: SharedVocabularyProvider(),
    EvidenceKind.EMBEDDING_MAP: EmbeddingMapProvider(),
    EvidenceKind.ACTIVATIONS: ActivationProvider(),
    EvidenceKind.SELECTION: SelectionProvider(),
    EvidenceKind.RANDOM_KEY: RandomKeyProvider(),
}


def evidence_cost(request: EvidenceRequest, texts: int) -> Cost | None:
    """Count the evidence of a request, with so many probe texts; None where a kind of it is not counted."""
    costs = [provider.cost(request, texts) for provider in providers_of(request.kinds)]
    known = [cost for cost in costs if cost is not None]
    return sum(known, Cost()) if len(known) == len(costs) else None


def providers_of(kinds: Iterable[EvidenceKind]) -> list[EvidenceProvider]:
    """Return the providers of some kinds, in a fixed order. Kinds that a fit collects itself have no provider."""
    wanted = set(kinds)
    return [provider for kind, provider in PROVIDERS.items() if kind in wanted]
