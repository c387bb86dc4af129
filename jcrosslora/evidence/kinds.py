"""The kinds of evidence that a method may ask for."""

from enum import StrEnum


class EvidenceKind(StrEnum):
    """What is collected from two bases before a method can run; the value is its name in reports."""

    SINGULAR_VECTORS = "truncated SVDs of both bases"
    SHARED_VOCABULARY = "shared vocabulary (optional)"
    EMBEDDING_MAP = "shared vocabulary, weights of all attention modules"
    ACTIVATIONS = "activations of both bases on the same text"
    ACTIVATION_GRAMS = "second moments of these activations"
    SELECTION = "a base that is made of parts of the other"
    RANDOM_KEY = "a seed"
    PROBE_TEXTS = "both bases run on text"
    COMPLETIONS = "completions that the source writes with its adapter"


# Kinds that need both bases run on text.
RUNNING = frozenset({EvidenceKind.ACTIVATIONS, EvidenceKind.PROBE_TEXTS, EvidenceKind.COMPLETIONS})
# Kinds for which the source is run with its adapter: the method fits an update of its own.
FITTING = frozenset({EvidenceKind.PROBE_TEXTS, EvidenceKind.COMPLETIONS})
