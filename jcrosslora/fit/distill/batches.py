"""Distillation batches: completions as both bases read them, and the tokens that predictions are compared on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.shared_tokens import shared_ids
from jcrosslora.checkpoint.tokenizer import Tokenizer, pad_right
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.text import Completion, Reading, read

# Tokens of a row: the fewer shapes, the less to compile.
WIDTHS = (24, 40, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 2560)
BATCH, _MOST_TOKENS = 8, 768  # rows of a batch, and its tokens, which make batches of long rows smaller
LONGEST = WIDTHS[-1]
_PLACES = 1 << 32  # above the characters of any content


@dataclass(frozen=True, eq=False)
class DistillationBatch:
    """B completions as both bases read them; T tokens a row, P matched positions. A flat index is row * T + position.

    Attributes:
        tokens_src: int32 (B, T), zero at padding, which is on the right.
        mask_src: bool (B, T), False at padding.
        tokens_tgt: int32 (B, T).
        mask_tgt: bool (B, T).
        at_src: int32 (P,), flat indices of matched positions of the source; zero where there is none.
        at_tgt: int32 (P,), the matching positions of the target.
        weight: float32 (P,), of each match in the fit; 0 where there is none.
    """

    tokens_src: np.ndarray
    mask_src: np.ndarray
    tokens_tgt: np.ndarray
    mask_tgt: np.ndarray
    at_src: np.ndarray
    at_tgt: np.ndarray
    weight: np.ndarray

    @property
    def positions(self) -> int:
        """Number of matched positions with a weight."""
        return int((self.weight > 0).sum())


@dataclass(frozen=True, eq=False)
class _Pair:
    """One completion: tokens of both bases up to the last match, and the matches."""

    ids: tuple[np.ndarray, np.ndarray]
    at: tuple[np.ndarray, np.ndarray]
    weight: np.ndarray

    @property
    def length(self) -> int:
        return max(map(len, self.ids))


def make_batches(
    completions: Sequence[Completion], tokenizers: tuple[Tokenizer, Tokenizer], prompt_weight: float
) -> list[DistillationBatch]:
    """Batch completions in rows of the smallest of `WIDTHS` that holds them, 8 or fewer together.

    Of a completion of more than 2,560 tokens the last ones are used.

    Args:
        completions: at least one with a match.
        tokenizers: of source and target.
        prompt_weight: weight of predictions inside a prompt; those of the answer's tokens have 1.

    Raises:
        UsageError: no completion has a matched position.
        CheckpointError: see `Tokenizer.encode`.
    """
    sides = ([read(tokenizer, item) for tokenizer in tokenizers] for item in completions)
    pairs = [pair for src, tgt in sides if len((pair := _match(src, tgt, prompt_weight)).weight)]
    if not pairs:
        msg = "no completion has a token that ends where one of the other base ends: give other prompts"
        raise UsageError(msg)
    found = []
    for width in WIDTHS:
        below = max((other for other in WIDTHS if other < width), default=0)
        group = [pair for pair in pairs if below < pair.length <= width]
        rows = max(1, min(BATCH, _MOST_TOKENS // width))
        found += [_batch(group[start : start + rows], rows, width) for start in range(0, len(group), rows)]
    return found


def _match(src: Reading, tgt: Reading, prompt_weight: float) -> _Pair:
    """Pair the tokens that end at the same place of the same content; of several on one side the first.

    The first position is never matched: models have huge activations there that say nothing about the text.
    """
    keys_src, keys_tgt = (
        np.where(one.content >= 0, one.content.astype(np.int64) * _PLACES + one.end, -1) for one in (src, tgt)
    )
    shared, at_src, at_tgt = np.intersect1d(keys_src, keys_tgt, return_indices=True)
    inside = (shared >= 0) & (at_src > 0) & (at_tgt > 0)
    at_src, at_tgt = at_src[inside], at_tgt[inside]
    # The token in front of the answer predicts its first one.
    weight = np.where(at_src >= src.answer - 1, 1.0, prompt_weight).astype(np.float32)
    ids, at, kept = [], [], np.ones(len(at_src), bool)
    for one, places in ((src, at_src), (tgt, at_tgt)):
        last = int(places[-1]) + 1 if len(places) else 0
        first = max(0, last - LONGEST)
        ids.append(one.ids[first:last])
        at.append(places - first)
        kept &= places - first > 0
    return _Pair((ids[0], ids[1]), (at[0][kept], at[1][kept]), weight[kept])


def _batch(pairs: Sequence[_Pair], rows: int, width: int) -> DistillationBatch:
    (tokens_src, mask_src), (tokens_tgt, mask_tgt) = (
        pad_right([pair.ids[side] for pair in pairs], (rows, width)) for side in (0, 1)
    )
    room = rows * width - sum(len(pair.weight) for pair in pairs)
    at_src, at_tgt = (
        np.pad(np.concatenate([row * width + pair.at[side] for row, pair in enumerate(pairs)]), (0, room))
        for side in (0, 1)
    )
    weight = np.pad(np.concatenate([pair.weight for pair in pairs]), (0, room))
    places = at_src.astype(np.int32), at_tgt.astype(np.int32)
    return DistillationBatch(tokens_src, mask_src, tokens_tgt, mask_tgt, *places, weight)


def shared_tokens(
    source: BaseModel,
    target: BaseModel,
    batches: Sequence[DistillationBatch],
    commonest: int,
    stops: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the shared tokens that predictions are compared on: those in the batches, and the commonest.

    The tokens of byte-pair encodings are numbered in the order in which they were merged: low ids are frequent.

    Args:
        source: the source base.
        target: the target base.
        batches: all batches of the fit.
        commonest: how many of the source's lowest ids to take, whether they occur or not.
        stops: tokens of source and target that end a text; they are left out, as the end is a symbol of its own.

    Returns:
        Their ids in source and target, int32 (V,) each.

    Raises:
        MethodError: a vocabulary cannot be read, or the two share too few tokens.
    """
    ids, reason = shared_ids(source, target)
    if ids is None:
        msg = f"predictions cannot be compared: {reason}; use another method"
        raise MethodError(msg)
    order = np.argsort(ids[0])
    ids_src, ids_tgt = (side[order].astype(np.int32) for side in ids)
    kept = np.isin(ids_src, used_tokens(batches, 0)) | np.isin(ids_tgt, used_tokens(batches, 1))
    kept |= np.arange(len(ids_src)) < commonest
    kept &= ~np.isin(ids_src, list(stops[0])) & ~np.isin(ids_tgt, list(stops[1]))
    return ids_src[kept], ids_tgt[kept]


def used_tokens(batches: Sequence[DistillationBatch], side: int) -> np.ndarray:
    """int32, ascending: the tokens that occur in the batches of the source (side 0) or the target (side 1)."""
    rows = [(batch.tokens_src, batch.tokens_tgt)[side].ravel() for batch in batches]
    return np.unique(np.concatenate(rows))
