"""First words of generated texts, drawn from the base's own vocabulary."""

from collections.abc import Mapping

import numpy as np

from jcrosslora.errors import UsageError


def start_words(tokens: Mapping[bytes, int], count: int, seed: int) -> np.ndarray:
    """Draw token ids of capitalised whole words.

    A token counts as a whole word if it is a capital followed by small letters, and the vocabulary also has it with a
    space in front: pieces of words, such as "Th", mostly lack that form. If there are no such tokens (a script without
    capitals), tokens of letters are drawn, and if there are none of these either, any normal tokens.

    Args:
        tokens: bytes of a token -> its id, not empty.
        count: number of words.
        seed: for the order; no word is repeated before all have been used.

    Returns:
        int32 (count,). A larger count continues the list of a smaller one.
    """
    ids = np.asarray(_candidates(tokens), np.int32)
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(ids) for _ in range(-(-count // len(ids)))]
    return np.concatenate(rounds)[:count]


def check_seed(seed: int) -> None:
    """Check that a seed fits the random generators of numpy and JAX.

    Raises:
        UsageError: it is not from 0 to 2^32 - 1.
    """
    if not 0 <= seed < 1 << 32:
        msg = f"seed {seed} was asked for, wanted 0 to {(1 << 32) - 1}"
        raise UsageError(msg)


def _candidates(tokens: Mapping[bytes, int]) -> list[int]:
    words = {token: index for token, index in tokens.items() if _text(token).isalpha()}
    whole = [index for token, index in words.items() if _is_capitalised(_text(token)) and b" " + token in tokens]
    return sorted(whole or words.values() or tokens.values())


def _is_capitalised(word: str) -> bool:
    # "A" and "I" are words, but hardly any other single letters are.
    return len(word) > 1 and word[0].isupper() and word[1:].islower()


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")  # U+FFFD is no letter
