"""Batches of probe texts: tokens of both bases in arrays of one shape, matched where they end at the same character."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint.tokenizer import Encoded, Tokenizer, pad_right
from jcrosslora.errors import UsageError

_STEP = 8  # T and P are multiples of it, so that texts of nearly the same length need no new compilation


@dataclass(frozen=True, eq=False)
class MatchedTokens:
    """B texts tokenised for both bases; T positions a text, P matched positions. A flat index is row * T + position.

    Attributes:
        tokens_src: int32 (B, T), zero at padding, which is on the right.
        mask_src: bool (B, T), False at padding; a row without any text is all False.
        tokens_tgt: int32 (B, T).
        mask_tgt: bool (B, T).
        at_src: int32 (P,), flat indices into the source's positions; zero if the list of matches is padded.
        at_tgt: int32 (P,), the matching flat indices into the target's.
    """

    tokens_src: np.ndarray
    mask_src: np.ndarray
    tokens_tgt: np.ndarray
    mask_tgt: np.ndarray
    at_src: np.ndarray
    at_tgt: np.ndarray


@dataclass(frozen=True, eq=False)
class ProbeBatch(MatchedTokens):
    """Probe texts, matched in ascending order.

    Attributes:
        valid: bool (P,), False if the list of matches is padded.
        text: int32 (P,), index of each match's text in the given list.
        end: int32 (P,), character of that text at which the matched tokens end.
    """

    valid: np.ndarray
    text: np.ndarray
    end: np.ndarray


@dataclass(frozen=True, eq=False)
class _Pair:
    text: int
    ids_src: np.ndarray
    ids_tgt: np.ndarray
    at_src: np.ndarray
    at_tgt: np.ndarray
    end: np.ndarray

    @property
    def length(self) -> int:
        return max(len(self.ids_src), len(self.ids_tgt))


def probe_batches(
    texts: Iterable[str],
    tokenizers: tuple[Tokenizer, Tokenizer],
    *,
    length: int = 128,
    batch: int = 8,
    positions: int | None = None,
    width: int | None = None,
) -> list[ProbeBatch]:
    """Tokenize texts for both bases and match their positions (see `match_positions`).

    The first position of a text and bos are never matched: models have huge activations there that say nothing about
    the text. Tokens after the last match of a text are dropped, and so are texts without a match.

    Args:
        length: the most tokens of a text, on each side; the rest is cut off.
        batch: B. Texts of similar length are batched together, the longest first; the last batch is padded with empty
            rows.
        positions: P; a batch with more matches keeps P of them, evenly spread. None takes the number of the fullest
            batch, rounded up.
        width: T, at least `length`, to give calls with other texts the same shape.

    Returns:
        At least one batch, all of the same shape: unless given, T is the longest row's length, rounded up to a
        multiple of 8.

    Raises:
        UsageError: a size below 1, or no text has a matched position.
        CheckpointError: see `Tokenizer.encode`.
    """
    if min(length, batch, 1 if positions is None else positions) < 1:
        raise UsageError(f"probe batches of {length=}, {batch=}, {positions=} were asked for: each must be at least 1")
    if width is not None and width < length:
        msg = f"probe batches of {width=} were asked for with texts of {length=}: the width must be at least that"
        raise UsageError(msg)
    src, tgt = tokenizers
    encoded = (_pair(place, src.encode(text), tgt.encode(text), length) for place, text in enumerate(texts))
    pairs = sorted((pair for pair in encoded if len(pair.at_src)), key=lambda pair: -pair.length)
    if not pairs:
        msg = f"no probe text has a token that ends where one of the other base ends within {length} tokens: give more"
        raise UsageError(msg)
    groups = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    fullest = max(sum(len(pair.at_src) for pair in group) for group in groups)
    places = _rounded(fullest) if positions is None else positions
    return [_batch(group, batch, width or _rounded(pairs[0].length), places) for group in groups]


def count_positions(batches: Sequence[ProbeBatch]) -> int:
    """Count the matched positions in all batches."""
    return sum(int(batch.valid.sum()) for batch in batches)


def _pair(text: int, src: Encoded, tgt: Encoded, length: int) -> _Pair:
    at_src, at_tgt = match_positions(_cut(src, length), _cut(tgt, length))
    inside = (at_src > 0) & (at_tgt > 0)
    at_src, at_tgt = at_src[inside], at_tgt[inside]
    last_src, last_tgt = (int(at[-1]) + 1 if len(at) else 0 for at in (at_src, at_tgt))
    return _Pair(text, src.ids[:last_src], tgt.ids[:last_tgt], at_src, at_tgt, src.ends[at_src])


def _cut(encoded: Encoded, length: int) -> Encoded:
    return Encoded(encoded.ids[:length], encoded.ends[:length])


def _rounded(size: int) -> int:
    return -(-size // _STEP) * _STEP


def _batch(pairs: Sequence[_Pair], batch: int, width: int, places: int) -> ProbeBatch:
    tokens_src, mask_src = pad_right([pair.ids_src for pair in pairs], (batch, width))
    tokens_tgt, mask_tgt = pad_right([pair.ids_tgt for pair in pairs], (batch, width))
    at_src = np.concatenate([row * width + pair.at_src for row, pair in enumerate(pairs)])
    at_tgt = np.concatenate([row * width + pair.at_tgt for row, pair in enumerate(pairs)])
    text = np.concatenate([np.full(len(pair.at_src), pair.text) for pair in pairs])
    end = np.concatenate([pair.end for pair in pairs])
    kept = np.arange(len(at_src))
    if len(kept) > places:
        kept = kept[np.linspace(0, len(kept) - 1, places).astype(np.int64)]
    valid = np.arange(places) < len(kept)
    at_src, at_tgt, text, end = (_filled(values[kept], places) for values in (at_src, at_tgt, text, end))
    return ProbeBatch(tokens_src, mask_src, tokens_tgt, mask_tgt, at_src, at_tgt, valid, text, end)


def _filled(values: np.ndarray, places: int) -> np.ndarray:
    return np.pad(values, (0, places - len(values))).astype(np.int32)


def match_positions(src: Encoded, tgt: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Pair the tokens of two encodings of one text that end at the same character.

    If several tokens of one side end at the same character (the later ones cover no text), the first is used.
    Leading tokens that cover no text (bos) and tokens that end inside a character are not paired.

    Returns:
        Two int64 arrays (N,), both ascending: indices of tokens in `src` and in `tgt`.
    """
    shared, at_src, at_tgt = np.intersect1d(src.ends, tgt.ends, return_indices=True)
    inside = shared > 0
    return at_src[inside], at_tgt[inside]
