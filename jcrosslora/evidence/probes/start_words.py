"""The words that self-written texts begin with, drawn from a base's own vocabulary."""

from collections.abc import Mapping

import numpy as np

from jcrosslora.errors import UsageError


def start_words(tokens: Mapping[bytes, int], count: int, seed: int) -> np.ndarray:
    """Token ids of capitalised whole words.

    A token counts as a whole word if it is letters, a capital and then small ones, and the vocabulary has it behind
    a space as well: pieces from inside words, such as "Th", mostly lack that form. Where no token is so (a script
    without capitals), words of letters are taken, and without those any normal token.

    Args:
        tokens: bytes of a token -> its id, not empty.
        count: number of words.
        seed: of the order; no word comes twice before all have come.

    Returns:
        int32 (count,). A larger count continues the list of a smaller one.
    """
    ids = np.asarray(_candidates(tokens), np.int32)
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(ids) for _ in range(-(-count // len(ids)))]
    return np.concatenate(rounds)[:count]


def check_seed(seed: int) -> None:
    """Check that a seed fits both generators, numpy's and JAX's.

    Raises:
        UsageError: it does not.
    """
    if not 0 <= seed < 1 << 32:
        msg = f"seed {seed} was asked for, wanted 0 to {(1 << 32) - 1}"
        raise UsageError(msg)


def _candidates(tokens: Mapping[bytes, int]) -> list[int]:
    words = {token: index for token, index in tokens.items() if _text(token).isalpha()}
    whole = [index for token, index in words.items() if _is_capitalised(_text(token)) and b" " + token in tokens]
    return sorted(whole or words.values() or tokens.values())


def _is_capitalised(word: str) -> bool:
    # "A" and "I" are words, but hardly any other single letter is.
    return len(word) > 1 and word[0].isupper() and word[1:].islower()


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")  # U+FFFD is no letter
