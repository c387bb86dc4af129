"""Match tokens of two tokenizers that end at the same character."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jcrosslora.checkpoint.tokenizer import Encoded


def match_positions(src: "Encoded", tgt: "Encoded") -> tuple[np.ndarray, np.ndarray]:
    """Pair the tokens of two encodings of one text that end at the same character.

    If several tokens of one side end at the same character (the later ones cover no text), the first is used.
    Leading tokens that cover no text (bos) and tokens that end inside a character are not paired.

    Args:
        src: encoding by the source's tokenizer.
        tgt: encoding by the target's tokenizer.

    Returns:
        Two int64 arrays (N,), both ascending: indices of tokens in `src` and in `tgt`.
    """
    shared, at_src, at_tgt = np.intersect1d(src.ends, tgt.ends, return_indices=True)
    inside = shared > 0
    return at_src[inside], at_tgt[inside]
