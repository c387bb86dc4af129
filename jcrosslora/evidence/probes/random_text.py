"""Random token strings: the control for texts that a model understands."""

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.errors import CheckpointError, UsageError
from jcrosslora.evidence.probes.start_words import check_seed


def random_texts(base: BaseModel, count: int, *, length: int = 96, seed: int = 0) -> list[str]:
    """Draw strings of tokens from a base's vocabulary, all equally likely.

    Only normal tokens are drawn that are whole characters and hold no control character, so that any tokenizer can read
    the strings and a file can hold a text on each line.

    Args:
        base: the base whose vocabulary is drawn from.
        count: number of texts.
        length: tokens in each.
        seed: the same seed gives the same texts.

    Raises:
        UsageError: count or length below 1, or a seed outside 0 to 2^32 - 1.
        CheckpointError: the vocabulary cannot be read or has no such tokens.
    """
    if count < 1 or length < 1:
        msg = f"{count} random texts of {length} tokens were asked for: both must be at least 1"
        raise UsageError(msg)
    check_seed(seed)
    words = sorted(word for token in readable_vocabulary(base) if (word := _as_text(token)) is not None)
    if not words:
        msg = f"{base.ref}: the tokenizer has no token that is text by itself: give texts of your own"
        raise CheckpointError(msg)
    drawn = np.random.default_rng(seed).integers(0, len(words), (count, length))
    return ["".join(words[index] for index in row) for row in drawn]


def readable_vocabulary(base: BaseModel) -> dict[bytes, int]:
    """Return the normal tokens of a base as bytes, with their ids.

    Raises:
        CheckpointError: they cannot be read.
    """
    vocabulary: Vocabulary = base.vocabulary()
    if vocabulary.tokens is None:
        msg = f"{base.ref}: its vocabulary cannot be read ({vocabulary.reason}): add its tokenizer.json"
        raise CheckpointError(msg)
    return dict(vocabulary.tokens)


def _as_text(token: bytes) -> str | None:
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None
