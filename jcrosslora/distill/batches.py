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

# Tokens of a row, in steps of an eighth to a quarter: what is longer than the texts is computed for nothing.
WIDTHS = 16, 24, *range(32, 128, 16), *range(128, 256, 32), *range(256, 512, 64), *range(512, 1024, 128)
WIDTHS = *WIDTHS, *range(1024, 2561, 256)
FIT_ROWS, _MOST_TOKENS = 4, 384  # rows of a batch, and its tokens, which make batches of long rows smaller
LONGEST_ROW = WIDTHS[-1]
# Tokens of padding in a pass that cost less over a whole fit than compiling for one more shape.
_FEW = 384
_PARTS = 4  # the number of compared positions is rounded up to a multiple of a quarter of the batch's tokens
_PLACES = 1 << 32  # above the characters of any content
# The most bytes of activations that layers keep for the backward pass, which else takes another forward pass, and of a
# round's predictions that are kept for its further passes; and the shares of free memory that these may take.
_MOST_KEPT, _MOST_REMEMBERED = 4 * 2**30, 2 * 2**30
_SHARES = 0.5, 0.25
_NUMBER = np.dtype(np.float32).itemsize


@dataclass(frozen=True, eq=False)
class DistillationBatch(MatchedTokens):
    """Completions. Positions of the target inside an answer that match none of the source are among the P as well.

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
    """What positions weigh: those of a prompt, the text in the teacher of likely answers, right answers, and ends."""

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
    """Batch completions of about the same number of the target's tokens, 4 or fewer together.

    Rows are padded to the smallest of `WIDTHS` that holds them, or to a larger one if few batches would have that
    width. Completions of more than 2,560 tokens keep the last ones. Predictions of an answer's tokens have weight 1,
    those inside a prompt `prompt_weight`, those of the end of an answer 0 unless `ends`, and those of a labelled answer
    `example_weight`. For answers that the source wrote at temperature 0, the text itself has the share `text_weight` in
    the teacher.

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
        # Room for as many positions in all batches of a shape, so that they have one program.
        most, part = max(sum(len(pair.weight) for pair in group) for group in alike), -(-rows * width // _PARTS)
        places = -(-most // part) * part
        found += [_batch(group, rows, (own, width), places) for group, own in zip(alike, read, strict=True)]
    return found


def _groups(pairs: Sequence[_Pair]) -> dict[int, list[list[_Pair]]]:
    """Divide completions into batches by the target's width; short ones fill up batches of longer ones."""
    widths, found = _few_widths([row_shape(len(pair.ids[1]))[1] for pair in pairs], 1), {}
    order = sorted(range(len(pairs)), key=lambda place: -widths[place])
    while order:
        width = widths[order[0]]
        rows, _ = row_shape(width)
        found.setdefault(width, []).append([pairs[place] for place in order[:rows]])
        order = order[rows:]
    return found


def _few_widths(widths: Sequence[int], rows: int) -> list[int]:
    """Replace the widths of so many rows each by the next wider ones where that pads less than to compile is worth."""
    found = [*widths]
    for width in sorted(set(widths)):
        wider = min((other for other in found if other > width), default=width)
        if found.count(width) * rows * (wider - width) <= _FEW:
            found = [wider if other == width else other for other in found]
    return found


def row_shape(tokens: int) -> tuple[int, int]:
    """Return the rows of a batch of completions of so many tokens, at most `LONGEST_ROW`, and their width."""
    width = next((width for width in WIDTHS if tokens <= width), LONGEST_ROW)
    return max(1, min(FIT_ROWS, _MOST_TOKENS // width)), width


def _match(completion: Completion, tokenizers: tuple[Tokenizer, Tokenizer], weights: _Weights) -> _Pair:
    """Pair the tokens that end at the same character of the same message; of several on one side the first.

    The first position is never matched: models have huge activations there that say nothing about the text. Positions
    of the target inside the answer that match nothing are compared with the text alone.
    """
    src, tgt = (read(tokenizer, completion) for tokenizer in tokenizers)
    at_src, at_tgt = match_positions(*(Encoded(one.ids, _ends(one)) for one in (src, tgt)))
    inside = (at_src > 0) & (at_tgt > 0)
    at_src, at_tgt = at_src[inside], at_tgt[inside]
    last = int(at_tgt[-1]) if len(at_tgt) else 0
    alone = np.setdiff1d(np.arange(max(1, tgt.answer - 1), last), at_tgt)
    # Tokens that end inside a character are alike where all are.
    like = alone if np.array_equal(src.ids, tgt.ids) else np.full(len(alone), -1)
    at_src, at_tgt = np.concatenate([at_src, like]), np.concatenate([at_tgt, alone])
    answer = at_tgt >= tgt.answer - 1  # the token in front of the answer predicts its first one
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
    """Count the ends of all contents in one row of numbers from 1 on, so that equal ones are one place; else -1."""
    return np.where(reading.content >= 0, reading.content.astype(np.int64) * _PLACES + reading.end + 1, -1)


def _cut(tokenizer: Tokenizer, reading: Reading, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a reading behind its last place and, if it is too long, in front, see `last_tokens`.

    Return the tokens; the places in them, negative for -1 and for what is cut off; and the token behind each place, -1
    where none or the one that ends the answer follows.
    """
    last = int(places.max(initial=-1)) + 1
    ids = last_tokens(tokenizer, reading.ids[:last], LONGEST_ROW)
    lost = last - len(ids)  # the first token, which may have stayed, is no place
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
    """int32, ascending: the tokens that occur in the batches of the source (side 0) or the target (side 1)."""
    return np.unique(np.concatenate([(one.tokens_src, one.tokens_tgt)[side].ravel() for one in batches]))


def most_kept(free: int | None = None) -> tuple[int, int]:
    """Return the bytes of activations and of predictions that a fit may keep, given what is free; None if unknown."""
    most = _MOST_KEPT, _MOST_REMEMBERED
    if free is None:
        return most
    kept, remembered = (min(one, int(share * free)) for one, share in zip(most, _SHARES, strict=True))
    return kept, remembered


def needs_remat(settings: DecoderSettings, shape: tuple[int, ...], most: int = _MOST_KEPT) -> bool:
    """Check whether the activations kept for the backward pass of (B, T) tokens take more than so many bytes."""
    return _activations(settings, shape) > most


def peak_bytes(target: BaseModel, settings: DistillSettings, free: int | None = None) -> int:
    """Return the bytes that a fit may take on top of the weights of both bases, with prompts of a usual length.

    They are the predictions that it remembers, the activations that it keeps, as many as `most_kept` allows of the
    bytes that the weights leave free, and the factors of all modules that it fits, four times: in training, the best
    ones, and two moments. The decoder has to support the target.
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

    A position takes about twice the MLP's width and three times those of the stream and of attention, in float32, and
    for each expert that it goes through what that returns and twice its width, by XLA's memory analysis of bases of
    0.1B to 8B parameters.
    """
    blocks = [block for layer in dict.fromkeys(settings.stack) for block in layer.blocks]
    mixed = max(settings.heads * settings.head_dim, *(block.mixed_size for block in blocks))
    wide = 2 if settings.layers_with("wide_up_proj") else 1
    width = 2 * wide * settings.intermediate + 3 * (settings.hidden + mixed)
    if experts := next((layer.experts for layer in settings.stack if layer.experts is not None), None):
        width += experts.routing.used * (2 * experts.width + settings.hidden)
    return _NUMBER * settings.layers * math.prod(shape) * width
