"""Unpack numbers of a few bits from 32-bit words, lowest bits first."""

import numpy as np

WORD = 32  # bits


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Unpack along the last axis; a number may span two words, as with 3 bits.

    Args:
        words: (..., W) integers of 32 bits, with W * 32 >= count * bits.
        bits: bits of a number, 1 to 8.
        count: number of numbers.

    Returns:
        (..., count) uint8.
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    if WORD % bits == 0:
        shifts = np.arange(0, WORD, bits, dtype=np.uint32)
        numbers = (words[..., None] >> shifts) & np.uint32(2**bits - 1)
        return numbers.astype(np.uint8).reshape(*words.shape[:-1], -1)[..., :count]
    first = np.arange(count) * bits
    place, shift = first // WORD, (first % WORD).astype(np.uint64)
    wide = np.concatenate([words, np.zeros_like(words[..., :1])], axis=-1).astype(np.uint64)
    numbers = wide[..., place] >> shift | wide[..., place + 1] << (np.uint64(WORD) - shift)
    return (numbers & np.uint64(2**bits - 1)).astype(np.uint8)
