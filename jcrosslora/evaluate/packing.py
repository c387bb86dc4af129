"""Pack questions into rows of few shapes, so that common text is computed once and there is little padding.

A row holds several questions one after another; the choices of a question all continue the same tokens, see `Layout`. A
prefix of more questions than fit in a row is computed once, and its KV cache is shared by the rows. Models with a
recurrent state get one text per row, with its question as the prefix.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.run import EMPTY
from jcrosslora.checkpoint.tokenizer import pad_right
from jcrosslora.decoder.layout import Layout
from jcrosslora.decoder.prompt_batches import common_beginnings

_NARROWEST, _WIDE = 32, 512  # bounds of a row in tokens, unless a question is longer
# Estimates: the overhead of a call in tokens (it reads all weights), and the width at which attention takes as long as
# the matrix products. SmolLM2-135M took 7.0 s in rows of 128 and 9.4 s in rows of 256 (float32, one busy core, one run
# each).
_CALL, _ATTENTION = 64, 1024
_SMALLEST = 8  # smallest padded length in tokens


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

    def __len__(self) -> int:
        """Return the number of tokens; the prefix counts once."""
        return len(self.prefix) + sum(map(len, self.tails))

    def straddles(self, length: int) -> bool:
        """Return whether some choices are longer than a length and others are not."""
        return len({len(self.prefix) + len(tail) > length for tail in self.tails}) > 1

    def unshared(self) -> "Tokens":
        """Move the prefix into the tail of each choice."""
        tails = tuple(np.concatenate([self.prefix, tail]) for tail in self.tails)
        return Tokens(self.prefix[:0], tails, tuple(first + len(self.prefix) for first in self.scored))


@dataclass(frozen=True, eq=False)
class Batch:
    """Questions in R rows of T tokens; S scored tokens.

    Attributes:
        rows: int32 (R, T), zero at padding.
        layout: of the rows, without `beginnings`.
        picked: int64 (S,), index into the flattened (R, T): the position before each scored token.
        wanted: int32 (S,), the scored tokens.
        places: int64 (S, 2), question (of the task) and choice of each scored token.
        beginnings: int32 (Q, P) and bool mask, the prefixes that rows continue; None if rows hold whole texts.
        owners: int32 (R,), index of each row's prefix.
    """

    rows: np.ndarray
    layout: Layout
    picked: np.ndarray
    wanted: np.ndarray
    places: np.ndarray
    beginnings: tuple[np.ndarray, np.ndarray] | None
    owners: np.ndarray

    @property
    def given(self) -> tuple[Any, ...]:
        """The inputs of a forward pass."""
        return self.rows, self.layout, self.beginnings, self.owners

    @property
    def questions(self) -> int:
        """The number of questions; each is in one batch only."""
        return len(np.unique(self.places[:, 0]))


class _Block(NamedTuple):
    """Questions with a common prefix, N tokens one after another; indices count from the first token.

    Attributes:
        fields: int32 (4, N), the tokens with their `Layout`: positions, lengths and ends.
        picked: int64 (S,); this and the rest as in `Batch`.
    """

    fields: np.ndarray
    picked: np.ndarray
    wanted: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, items: Mapping[int, Tokens], members: Sequence[int], shared: int = 0) -> "_Block":
        """Lay out one question, or several that share their first `shared` tokens."""
        whole = shared + sum(len(items[index]) - shared for index in members)
        longest = [len(items[index].prefix) + max(map(len, items[index].tails)) for index in members]
        pieces = [(items[members[0]].prefix[:shared], 0, max(longest), whole)]
        at, scored = shared, []
        for index, length in zip(members, longest, strict=True):
            one = items[index]
            pieces.append((one.prefix[shared:], shared, length, at + len(one) - shared))
            at += len(one.prefix) - shared
            for choice, (tail, first) in enumerate(zip(one.tails, one.scored, strict=True)):
                pieces.append((tail, len(one.prefix), len(one.prefix) + len(tail), at + len(tail)))
                places = np.tile([index, choice], (len(tail) - first, 1))
                scored.append((at + np.arange(first - 1, len(tail) - 1), tail[first:], places))
                at += len(tail)
        fields = [
            np.stack([ids, start + np.arange(len(ids)), np.full(len(ids), length), np.full(len(ids), end)])
            for ids, start, length, end in pieces
        ]
        return cls(np.concatenate(fields, axis=1).astype(np.int32), *map(np.concatenate, zip(*scored, strict=True)))

    @property
    def size(self) -> int:
        """The number of tokens, N."""
        return self.fields.shape[1]


def packed(items: Sequence[Tokens], positions: int, *, share: bool) -> Iterator[Batch]:
    """Pack questions for a base whose layers all have attention.

    A batch has at most `positions` token positions, padding included, or a single row. With `share`, a common
    prefix of several questions is read once.
    """
    known, alone, blocks = dict(enumerate(items)), set(range(len(items))), []
    groups = common_beginnings([one.prefix for one in items]) if share else []
    for group in sorted(groups, key=lambda group: -group.length):
        alone -= set(group.places)
        if sum(len(items[index]) for index in group.places) - group.saved <= _WIDE:  # they fit in one row
            blocks.append(_Block.of(known, group.places, group.length))
            continue
        beginning = items[group.places[0]].prefix[: group.length]
        known |= {index: replace(known[index], prefix=known[index].prefix[group.length :]) for index in group.places}
        yield from _in_rows([_Block.of(known, [index]) for index in group.places], positions, beginning)
    yield from _in_rows([*blocks, *(_Block.of(known, [index]) for index in sorted(alone))], positions)


def _in_rows(blocks: Sequence[_Block], positions: int, beginning: np.ndarray | None = None) -> Iterator[Batch]:
    """Put blocks into rows, longest first: if memory runs out, it does so at once."""
    by_width: dict[int, list[_Block]] = {}
    for block in sorted(blocks, key=lambda block: -block.size):
        by_width.setdefault(max(_WIDE, _rounded(block.size)), []).append(block)
    for widest, own in by_width.items():
        shapes = [_best_fit(own, width, positions, beginning) for width in _widths(own[0].size, widest, positions)]
        rows, shape, _ = min(shapes, key=lambda each: each[-1])
        for start in range(0, len(rows), shape[0]):
            yield _batch(rows[start : start + shape[0]], shape, beginning)


def _widths(longest: int, widest: int, positions: int) -> list[int]:
    """Return the candidate row widths, several if texts are short."""
    least = max(_NARROWEST, _rounded(longest))
    return [
        width for width in (least << more for more in range(8)) if width == least or width <= min(widest, positions)
    ]


def _best_fit(
    blocks: Sequence[_Block], width: int, positions: int, beginning: np.ndarray | None
) -> tuple[list[list[_Block]], tuple[int, int], float]:
    """Put each block into the fullest row with room; return the rows, the batch shape and the cost in tokens."""
    rows: list[list[_Block]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for block in blocks:
        place = bisect_left(spaces, (block.size, 0))
        if place == len(spaces):
            free, row = width, len(rows)
            rows.append([])
        else:
            free, row = spaces.pop(place)
        rows[row].append(block)
        insort(spaces, (free - block.size, row))
    before = 0 if beginning is None else len(beginning)
    token, most = 1 + (before + width) / _ATTENTION, max(1, positions // width)
    counts = (1 << power for power in range(min(most, 2 * len(rows) - 1).bit_length()))
    taken, count = min((-(-len(rows) // count) * (_CALL + before + token * count * width), count) for count in counts)
    return rows, (count, width), taken


def _batch(rows: Sequence[Sequence[_Block]], shape: tuple[int, int], beginning: np.ndarray | None) -> Batch:
    (tokens, positions, lengths, ends), scored = np.zeros((4, *shape), np.int32), []
    positions[:] = EMPTY
    for number, blocks in enumerate(rows):
        at = 0
        for block in blocks:
            own = number, slice(at, at + block.size)
            tokens[own], positions[own], lengths[own], ends[own] = block.fields
            ends[own] += at
            scored.append((number * shape[1] + at + block.picked, block.wanted, block.places))
            at += block.size
    before = None if beginning is None else pad_right([beginning], (1, _rounded(len(beginning))))
    picked, wanted, places = map(np.concatenate, zip(*scored, strict=True))
    layout = Layout(*map(jnp.asarray, (positions, lengths, ends)))
    return Batch(tokens, layout, picked, wanted, places, before, np.zeros(shape[0], np.int32))


def unpacked(items: Sequence[Tokens], positions: int) -> Iterator[Batch]:
    """Batch questions for a recurrent base, longest first; each choice has a row that continues its question.

    A batch has at most `positions` token positions, padding included, or a single question.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(items):
        key = _rounded(len(item.prefix)), _rounded(max(map(len, item.tails)))
        shapes.setdefault(key, []).append(index)
    choices = round(np.mean([len(item.tails) for item in items]))
    for (prefix, tail), members in sorted(shapes.items(), key=lambda entry: -sum(entry[0])):
        fitting = max(1, positions // (prefix + choices * tail))
        count = min(1 << (fitting.bit_length() - 1), 1 << (len(members) - 1).bit_length())
        rows = max(count * choices, *(len(items[index].tails) for index in members))
        for group in _fitting(items, members, count, rows):
            yield _one_a_row(items, group, (count, prefix), (rows, tail))


def _fitting(items: Sequence[Tokens], members: list[int], count: int, rows: int) -> Iterator[list[int]]:
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


def _one_a_row(items: Sequence[Tokens], group: list[int], head: tuple[int, int], body: tuple[int, int]) -> Batch:
    rows, mask = pad_right([tail for index in group for tail in items[index].tails], body)
    owners, scored, row = np.zeros(body[0], np.int32), [], 0
    for place, index in enumerate(group):
        for choice, (tail, first) in enumerate(zip(items[index].tails, items[index].scored, strict=True)):
            owners[row] = place
            picked = row * body[1] + np.arange(first - 1, len(tail) - 1)
            scored.append((picked, tail[first:], np.tile([index, choice], (len(tail) - first, 1))))
            row += 1
    picked, wanted, places = map(np.concatenate, zip(*scored, strict=True))
    before = pad_right([items[index].prefix for index in group], head)
    return Batch(rows, Layout.of(jnp.asarray(mask)), picked, wanted, places, before, owners)


def _rounded(length: int) -> int:
    """Round up to 8, 16, 32, ...: compiling one more shape costs more than the padding."""
    return max(_SMALLEST, 1 << (length - 1).bit_length()) if length else _SMALLEST
