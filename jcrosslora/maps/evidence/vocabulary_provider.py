"""The shared vocabulary as evidence for the signs of singular vectors."""

import dataclasses
from typing import Any

from jcrosslora.maps.evidence.records import Evidence
from jcrosslora.maps.evidence.request import EvidenceRequest, ModuleStack
from jcrosslora.utils.cost import Cost


class SharedVocabularyProvider:
    """Adds the moments of the shared vocabulary, or None where the bases share none."""

    is_costly = False
    reads_tokenizers = True

    def check(self, request: EvidenceRequest) -> None:
        """Accept every request: methods that use the vocabulary for signs work without it."""

    def cost(self, request: EvidenceRequest, texts: int) -> Cost:
        """Count nothing."""
        del request, texts
        return Cost()

    def cache_key(self, request: EvidenceRequest) -> Any:
        """Return None: the evidence depends on weights and tokenizers alone."""

    def collect(self, request: EvidenceRequest) -> Any:
        """Collect the moments once for the pair."""
        vocabulary = request.pair.vocabulary[0] if request.pair.shared_tokens[0] else None

        def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
            del stack
            return dataclasses.replace(evidence, vocabulary=vocabulary)

        return add
