"""Batches of questions as tokens: the tokens that all choices share are run once, then each choice continues them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer, pad_right
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.tasks import Question

_SMALLEST = 8


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a question and its choices.

    Attributes:
        prefix: int32 (P,), the tokens that all choices share.
        tails: int32 (T,) for each choice, the rest of its tokens; the first one is only read, never scored.
        scored: for each choice the index of the answer's first token in its tail, 1 or more.
    """

    prefix: np.ndarray
    tails: tuple[np.ndarray, ...]
    scored: tuple[int, ...]

    def straddles(self, length: int) -> bool:
        """Tell whether the text of one choice is longer than a length, and that of another is not."""
        return len({len(self.prefix) + len(tail) > length for tail in self.tails}) > 1

    def unshared(self) -> "Tokens":
        """Return the same with all tokens of each choice in its tail."""
        tails = tuple(np.concatenate([self.prefix, tail]) for tail in self.tails)
        return Tokens(self.prefix[:0], tails, tuple(first + len(self.prefix) for first in self.scored))


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions padded to one shape: Q questions, R rows with a choice each; S scored tokens.

    Attributes:
        prefix: int32 (Q, P).
        prefix_mask: bool (Q, P).
        tails: int32 (R, T).
        tail_mask: bool (R, T).
        owner: int32 (R,), the question of each row.
        picked: int64 (S,), index into the flattened (R, T): the position in front of each scored token.
        wanted: int32 (S,), the scored tokens.
        places: int64 (S, 2), question (of the task) and choice of each scored token.
        questions: number of questions without padding.
    """

    prefix: np.ndarray
    prefix_mask: np.ndarray
    tails: np.ndarray
    tail_mask: np.ndarray
    owner: np.ndarray
    picked: np.ndarray
    wanted: np.ndarray
    places: np.ndarray
    questions: int


def tokenize(tokenizer: Tokenizer, question: Question) -> Tokens:
    """Encode prompt and choice as one text for each choice.

    The answer's tokens are those behind the last token that ends in the prompt: a token that covers the end of the
    prompt and the start of the answer belongs to the answer.

    Raises:
        UsageError: a choice without a token of its own, or without a token in front of it.
    """
    encoded = [tokenizer.encode(f"{question.prompt} {choice}") for choice in question.choices]
    length = len(question.prompt)
    firsts = [int(np.flatnonzero((one.ends >= 0) & (one.ends <= length)).max(initial=-1)) + 1 for one in encoded]
    for one, first, choice in zip(encoded, firsts, question.choices, strict=True):
        if not 1 <= first < len(one.ids):
            msg = f"choice {choice[:60]!r}: the tokenizer of {tokenizer.ref} gives it no token of its own: reword it"
            raise UsageError(msg)
    shared = min(_common([one.ids for one in encoded]), *firsts) - 1
    cut = max(shared, 0)
    tails = tuple(one.ids[cut:] for one in encoded)
    return Tokens(encoded[0].ids[:cut], tails, tuple(first - cut for first in firsts))


def batches(items: Sequence[Tokens], positions: int) -> Iterator[Batch]:
    """Batch all questions in few shapes, the longest first, so that memory runs out at once or never.

    Args:
        items: the questions.
        positions: the most token positions of a batch, padding included; a batch has at least one question.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(items):
        shapes.setdefault((_rounded(len(item.prefix)), _rounded(max(map(len, item.tails)))), []).append(index)
    usual = round(np.mean([len(item.tails) for item in items]))
    for (prefix, tail), members in sorted(shapes.items(), key=lambda entry: -sum(entry[0])):
        fitting = max(1, positions // (prefix + usual * tail))
        count = min(1 << (fitting.bit_length() - 1), 1 << (len(members) - 1).bit_length())
        rows = max(count * usual, *(len(items[index].tails) for index in members))
        for group in _packed(items, members, count, rows):
            yield _batch(items, group, (count, prefix), (rows, tail))


def _packed(items: Sequence[Tokens], members: list[int], count: int, rows: int) -> Iterator[list[int]]:
    group: list[int] = []
    used = 0
    for index in members:
        need = len(items[index].tails)
        if group and (len(group) == count or used + need > rows):
            yield group
            group, used = [], 0
        group.append(index)
        used += need
    yield group


def _batch(items: Sequence[Tokens], group: list[int], head: tuple[int, int], body: tuple[int, int]) -> Batch:
    prefix, prefix_mask = pad_right([items[index].prefix for index in group], head)
    tails, tail_mask = pad_right([tail for index in group for tail in items[index].tails], body)
    owner = np.zeros(body[0], np.int32)
    picked, wanted, places, row = [], [], [], 0
    for place, index in enumerate(group):
        for choice, (tail, first) in enumerate(zip(items[index].tails, items[index].scored, strict=True)):
            owner[row] = place
            picked.append(row * body[1] + np.arange(first - 1, len(tail) - 1))
            wanted.append(tail[first:])
            places.append(np.tile([index, choice], (len(tail) - first, 1)))
            row += 1
    return Batch(
        *(prefix, prefix_mask, tails, tail_mask, owner),
        picked=np.concatenate(picked),
        wanted=np.concatenate(wanted),
        places=np.concatenate(places),
        questions=len(group),
    )


def _common(rows: Sequence[np.ndarray]) -> int:
    """Count the tokens that all rows start with."""
    shortest = min(map(len, rows))
    same = np.all([row[:shortest] == rows[0][:shortest] for row in rows], axis=0)
    return shortest if same.all() else int(np.argmin(same))


def _rounded(length: int) -> int:
    """Round up to 8, 16, 32, ...: every further shape has to be compiled, which costs more than the padding."""
    return max(_SMALLEST, 1 << (length - 1).bit_length()) if length else _SMALLEST
