"""Tokens that two bases share: those that stand for the same bytes."""

from typing import Protocol

import numpy as np

from jcrosslora.checkpoint.vocabulary import Vocabulary

# Correlations over fewer shared tokens than this are no better than guesses.
FEWEST_TOKENS = 32


class HasVocabulary(Protocol):
    """A base, or a source that is asked."""

    @property
    def ref(self) -> str:
        """What was opened, for messages."""
        ...

    def vocabulary(self) -> Vocabulary:
        """Return its tokens."""
        ...


def shared_ids(source: HasVocabulary, target: HasVocabulary) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
    """Match the tokens of two bases that stand for the same bytes.

    Returns:
        Their ids (V,) in source and target, in the order of the tokens' bytes, and ""; or None and the reason.
    """
    vocabulary_src, vocabulary_tgt = source.vocabulary(), target.vocabulary()
    for base, vocabulary in ((source, vocabulary_src), (target, vocabulary_tgt)):
        if vocabulary.tokens is None:
            return None, f"{base.ref}: {vocabulary.reason}"
    assert vocabulary_src.tokens is not None
    assert vocabulary_tgt.tokens is not None
    shared = sorted(vocabulary_src.tokens.keys() & vocabulary_tgt.tokens.keys())
    if len(shared) < FEWEST_TOKENS:
        return None, f"the two vocabularies share {len(shared)} tokens, fewer than {FEWEST_TOKENS}"
    ids_src = np.array([vocabulary_src.tokens[token] for token in shared])
    ids_tgt = np.array([vocabulary_tgt.tokens[token] for token in shared])
    return (ids_src, ids_tgt), ""
