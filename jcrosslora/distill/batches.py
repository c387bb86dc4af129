"""Distillation batches: completions as tokens of both bases, with the positions where predictions are compared.

Also estimates the memory of a fit on top of the weights of both bases.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jcrosslora.checkpoint import ROLES, BaseModel, Encoded, Tokenizer, pad_right, roles_named
from jcrosslora.decoder import DecoderSettings, settings_of
from jcrosslora.decoder.loading import stack_shapes
from jcrosslora.distill.settings import MOST_TOKENS, DistillSettings
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.probe_batches import MatchedTokens, match_positions
from jcrosslora.text import Completion, Reading, last_tokens, read
from jcrosslora.utils.cost import TEXT

# Row widths in tokens; the steps are small because padding is wasted compute.
WIDTHS = 16, 24, *range(32, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, 1024, 128)
WIDTHS = *WIDTHS, *range(1024, 2561, 256)
FIT_ROWS, _MOST_TOKENS = 4, 384  # most rows and tokens of a batch, so that batches of long rows are smaller
LONGEST_ROW = WIDTHS[-1]
# Padding tokens in a pass that cost less over a whole fit than compiling one more shape.
_FEW = 384
_PARTS = 4  # the number of compared positions is rounded up to a multiple of a quarter of the batch's tokens
_PLACES = 1 << 32  # more than the characters of any content
# The most bytes of activations kept for the backward pass, which are recomputed otherwise, and of a round's predictions
# kept for its further passes; and the shares of free memory that these may take.
_MOST_KEPT, _MOST_REMEMBERED = 4 * 2**30, 2 * 2**30
_SHARES = 0.5, 0.25
_NUMBER = np.dtype(np.float32).itemsize


@dataclass(frozen=True, eq=False)
class DistillationBatch(MatchedTokens):
    """Completions; the P positions include target positions inside an answer that match no source position.

    Attributes:
        next_src: int32 (P,), the source's token after each position; -1 if there is none.
        next_tgt: int32 (P,), the same for the target.
        answer: bool (P,), whether a token of the answer follows.
        text_share: float32 (P,), 0 to 1: the share of the text itself in the teacher. It takes the target's next token
            (the end of the text if `next_tgt` is -1) as correct; see `Completion.taught`.
        weight: float32 (P,), of each position in the fit; 0 where there is none.
        labelled: how many of the completions are labelled examples.
    """

    next_src: np.ndarray
    next_tgt: np.ndarray
    answer: np.ndarray
    text_share: np.ndarray
    weight: np.ndarray
    labelled: int = 0

    @property
    def rows(self) -> int:
        """Number of completions."""
        return int(self.mask_tgt.any(axis=1).sum())

    @property
    def positions(self) -> int:
        """Number of positions with a weight."""
        return int((self.weight > 0).sum())


class _Pair(NamedTuple):
    """One completion: tokens of both bases up to the last match, and the compared positions, as in a batch."""

    ids: tuple[np.ndarray, np.ndarray]
    at: tuple[np.ndarray, np.ndarray]
    next: tuple[np.ndarray, np.ndarray]
    answer: np.ndarray
    text_share: np.ndarray
    weight: np.ndarray
    labelled: bool


class _Weights(NamedTuple):
    """Weights of prompt positions, of the text in the teacher of greedy answers, of labelled answers, and of ends."""

    prompt: float
    text: float
    example: float
    end: float

    def text_shares(self, completion: Completion) -> tuple[float, float]:
        """Return the shares of the text itself in the teacher: inside an answer, and at its end."""
        inside = 1.0 if completion.taught == "answer" else self.text if completion.greedy else 0.0
        return inside, inside if completion.taught == "nothing" else 1.0


def make_batches(
    completions: Sequence[Completion],
    tokenizers: tuple[Tokenizer, Tokenizer],
    prompt_weight: float,
    *,
    text_weight: float = 0.0,
    example_weight: float = 1.0,
    ends: bool = True,
) -> list[DistillationBatch]:
    """Batch completions of similar length in target tokens, at most 4 in a batch.

    Rows are padded to the smallest of `WIDTHS` that holds them, or to a larger one if few batches would have that
    width. Completions of more than 2,560 tokens keep the last ones. Predictions of answer tokens have weight 1, of
    prompt tokens `prompt_weight`, of the end of an answer 0 unless `ends`, and of a labelled answer `example_weight`.
    For answers that the source wrote at temperature 0, the text itself has the share `text_weight` in the teacher.

    Raises:
        UsageError: no completion has a matched position.
        CheckpointError: see `Tokenizer.encode`.
    """
    weights = _Weights(prompt_weight, text_weight, example_weight, float(ends))
    matched = (_match(item, tokenizers, weights) for item in completions)
    pairs = [pair for pair in matched if len(pair.weight)]
    if not pairs:
        raise UsageError("no completion has a token that ends where one of the other base ends: give other prompts")
    groups, found = _groups(pairs), []
    for width in sorted(groups):
        alike, rows = groups[width], row_shape(width)[0]
        read = _few_widths([row_shape(max(len(pair.ids[0]) for pair in group))[1] for group in alike], rows)
        # All batches of a shape have room for equally many positions, so that they share one program.
        most, part = max(sum(len(pair.weight) for pair in group) for group in alike), -(-rows * width // _PARTS)
        places = -(-most // part) * part
        found += [_batch(group, rows, (own, width), places) for group, own in zip(alike, read, strict=True)]
    return found


def _groups(pairs: Sequence[_Pair]) -> dict[int, list[list[_Pair]]]:
    """Group completions into batches by target width; shorter ones fill up batches of longer ones."""
    widths, found = _few_widths([row_shape(len(pair.ids[1]))[1] for pair in pairs], 1), {}
    order = sorted(range(len(pairs)), key=lambda place: -widths[place])
    while order:
        width = widths[order[0]]
        rows, _ = row_shape(width)
        found.setdefault(width, []).append([pairs[place] for place in order[:rows]])
        order = order[rows:]
    return found


def _few_widths(widths: Sequence[int], rows: int) -> list[int]:
    """Round a width up when the padding costs less than compiling one more shape."""
    found = [*widths]
    for width in sorted(set(widths)):
        wider = min((other for other in found if other > width), default=width)
        if found.count(width) * rows * (wider - width) <= _FEW:
            found = [wider if other == width else other for other in found]
    return found


def row_shape(tokens: int) -> tuple[int, int]:
    """Return the rows of a batch of completions of up to `tokens` tokens, and their width, at most `LONGEST_ROW`."""
    width = next((width for width in WIDTHS if tokens <= width), LONGEST_ROW)
    return max(1, min(FIT_ROWS, _MOST_TOKENS // width)), width


def _match(completion: Completion, tokenizers: tuple[Tokenizer, Tokenizer], weights: _Weights) -> _Pair:
    """Pair tokens that end at the same character of the same message; if several on one side do, take the first.

    The first position is never matched: models have huge activations there that say nothing about the text. Target
    positions inside the answer that match nothing are compared with the text alone.
    """
    src, tgt = (read(tokenizer, completion) for tokenizer in tokenizers)
    at_src, at_tgt = match_positions(*(Encoded(one.ids, _ends(one)) for one in (src, tgt)))
    inside = (at_src > 0) & (at_tgt > 0)
    at_src, at_tgt = at_src[inside], at_tgt[inside]
    last = int(at_tgt[-1]) if len(at_tgt) else 0
    alone = np.setdiff1d(np.arange(max(1, tgt.answer - 1), last), at_tgt)
    # If both sides have the same tokens, those that end inside a character match as well.
    like = alone if np.array_equal(src.ids, tgt.ids) else np.full(len(alone), -1)
    at_src, at_tgt = np.concatenate([at_src, like]), np.concatenate([at_tgt, alone])
    answer = at_tgt >= tgt.answer - 1  # the token before the answer predicts its first one
    sides = [_cut(*one) for one in zip(tokenizers, (src, tgt), (at_src, at_tgt), strict=True)]
    behind = at_tgt + 1 == len(tgt.ids) - tgt.stop  # nothing, or the end, follows the last token
    inside, end = weights.text_shares(completion)
    text_share = np.where(behind, end * tgt.stop, inside * answer).astype(np.float32)
    weight = np.where(answer, weights.example if completion.taught == "answer" else 1.0, weights.prompt)
    weight = weight * np.where(behind & bool(tgt.stop), weights.end, 1.0)
    kept = ((sides[0][1] > 0) | (at_src < 0)) & (sides[1][1] > 0)
    (ids_src, at_src, next_src), (ids_tgt, at_tgt, next_tgt) = sides
    return _Pair(
        (ids_src, ids_tgt),
        (np.maximum(at_src, 0)[kept], at_tgt[kept]),
        (next_src[kept], next_tgt[kept]),
        answer[kept],
        text_share[kept],
        weight.astype(np.float32)[kept],
        completion.taught == "answer",
    )


def _ends(reading: Reading) -> np.ndarray:
    """Number token ends across all contents from 1, so that equal numbers are the same place; -1 elsewhere."""
    return np.where(reading.content >= 0, reading.content.astype(np.int64) * _PLACES + reading.end + 1, -1)


def _cut(tokenizer: Tokenizer, reading: Reading, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a reading after its last place and, if it is too long, at the start, see `last_tokens`.

    Return the tokens; the places in them, -1 for -1 and for what is cut off; and the token after each place, -1 where
    none or the one that ends the answer follows.
    """
    last = int(places.max(initial=-1)) + 1
    ids = last_tokens(tokenizer, reading.ids[:last], LONGEST_ROW)
    lost = last - len(ids)  # the first token may have been kept, but is no place
    behind = np.append(reading.ids[: len(reading.ids) - reading.stop], np.full(1 + reading.stop, -1))
    following = np.where(places >= 0, behind[places + 1], -1)
    return ids, np.where(places > lost, places - lost, -1), following


def _batch(pairs: Sequence[_Pair], rows: int, widths: tuple[int, int], places: int) -> DistillationBatch:
    (tokens_src, mask_src), (tokens_tgt, mask_tgt) = (
        pad_right([pair.ids[side] for pair in pairs], (rows, width)) for side, width in enumerate(widths)
    )
    room = places - sum(len(pair.weight) for pair in pairs)

    def joined(parts: Sequence[np.ndarray], empty: int, dtype: DTypeLike) -> np.ndarray:
        return np.pad(np.concatenate(parts), (0, room), constant_values=empty).astype(dtype)

    at_src, at_tgt = (
        joined([row * width + pair.at[side] for row, pair in enumerate(pairs)], 0, np.int32)
        for side, width in enumerate(widths)
    )
    next_src, next_tgt = (joined([pair.next[side] for pair in pairs], -1, np.int32) for side in (0, 1))
    answer = joined([pair.answer for pair in pairs], 0, bool)
    text_share = joined([pair.text_share for pair in pairs], 0, np.float32)
    weight = joined([pair.weight for pair in pairs], 0, np.float32)
    read = tokens_src, mask_src, tokens_tgt, mask_tgt
    labelled = sum(pair.labelled for pair in pairs)
    return DistillationBatch(*read, at_src, at_tgt, next_src, next_tgt, answer, text_share, weight, labelled)


def used_tokens(batches: Sequence[DistillationBatch], side: int) -> np.ndarray:
    """Return the source's (side 0) or the target's (side 1) tokens that occur in the batches, int32, ascending."""
    return np.unique(np.concatenate([(one.tokens_src, one.tokens_tgt)[side].ravel() for one in batches]))


def most_kept(free: int | None = None) -> tuple[int, int]:
    """Return the bytes of activations and of predictions that a fit may keep; `free` is None if unknown."""
    most = _MOST_KEPT, _MOST_REMEMBERED
    if free is None:
        return most
    kept, remembered = (min(one, int(share * free)) for one, share in zip(most, _SHARES, strict=True))
    return kept, remembered


def needs_remat(settings: DecoderSettings, shape: tuple[int, ...], most: int = _MOST_KEPT) -> bool:
    """Check whether the activations kept for the backward pass of (B, T) tokens take more than `most` bytes."""
    return _activations(settings, shape) > most


def peak_bytes(target: BaseModel, settings: DistillSettings, free: int | None = None) -> int:
    """Return the bytes that a fit may take on top of the weights of both bases, with prompts of a usual length.

    They are the remembered predictions and the kept activations, as many as `most_kept` allows with `free` bytes left
    by the weights, and the factors of all fitted modules four times: current, best, and two moments. The decoder has
    to support the target.
    """
    every = {role: shape for role, shape in stack_shapes(target).items() if role in ROLES}
    shapes = [every[role] for role in roles_named(settings.roles, every)]
    factors = sum(layers * min(settings.fit_rank, *sides) * sum(sides) for layers, *sides in shapes)
    rows, width = row_shape(TEXT + (settings.answer_tokens or MOST_TOKENS))
    columns, (kept, remembered) = min(settings.compared_tokens, target.dims.vocab), most_kept(free)
    remembered = min(remembered, _NUMBER * settings.course(prompted=True).first * width * columns)
    return remembered + min(kept, _activations(settings_of(target), (rows, width))) + 4 * _NUMBER * factors


def _activations(settings: DecoderSettings, shape: tuple[int, ...]) -> int:
    """Return the bytes of activations that are kept for the backward pass of (B, T) tokens.

    A position takes about twice the MLP's width and three times the hidden and attention widths, in float32, and for
    each routed expert its output and twice its width, by XLA's memory analysis of bases of 0.1B to 8B parameters.
    """
    blocks = [block for layer in dict.fromkeys(settings.stack) for block in layer.blocks]
    mixed = max(settings.heads * settings.head_dim, *(block.mixed_size for block in blocks))
    wide = 2 if settings.layers_with("wide_up_proj") else 1
    width = 2 * wide * settings.intermediate + 3 * (settings.hidden + mixed)
    if experts := next((layer.experts for layer in settings.stack if layer.experts is not None), None):
        width += experts.routing.used * (2 * experts.width + settings.hidden)
    return _NUMBER * settings.layers * math.prod(shape) * width
