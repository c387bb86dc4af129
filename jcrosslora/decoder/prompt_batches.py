"""Put prompts into batches of few shapes; a prefix that several prompts share is computed once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jcrosslora.utils.cost import TEXT, Cost

WRITING_ROWS, _WIDE = 48, 96  # rows of a full batch, and the longest prompt (tokens) that full batches are used for
_READ = WRITING_ROWS * _WIDE  # tokens that are read in one pass, padding included
_SLOTS = WRITING_ROWS * 512  # cache slots of a batch, without those for new tokens
_ROWS = (8, 24, WRITING_ROWS)  # rows of a batch: the smallest that fits is used, because empty rows take time too
_BEGINNINGS = (1, 2, 4, 8)  # prefixes of a batch: the smallest that fits is used
# Widths up to `_WIDE` and the room for new tokens are rounded up to a multiple of this, so that one compiled program
# serves nearly equal lengths. Longer texts use the few widths below.
_MULTIPLE = 16
_WIDTHS = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
LONGEST_PROMPT = _WIDTHS[-1]  # tokens; of a longer text only the last ones are read
SHORTEST = 32  # tokens of the shortest shared prefix; prefix lengths are multiples of `_MULTIPLE`
# Shared prefixes are used if they leave at most this share of the tokens, because they need another compilation and
# two passes.
_WORTH = 0.9
# Prompts are read with an adapter and kept in the cache: 48 took 104 to 115 ms where passes of 8 texts without take 73.
_PREFILL = 1.5


class Group(NamedTuple):
    """Two or more prompts that share a prefix of `length` tokens and are all longer than it."""

    places: list[int]
    length: int

    @property
    def saved(self) -> int:
        """Tokens that need not be read again."""
        return (len(self.places) - 1) * self.length


@dataclass(frozen=True, eq=False)
class Beginnings:
    """The different prefixes of the prompts of a batch: token ids int32 (T,), padded to a shape (G, P).

    Attributes:
        owners: the index of each prompt's prefix.
    """

    tokens: list[np.ndarray]
    owners: list[int]
    shape: tuple[int, int]

    def arrays(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens int32 (G, P) and their mask, padded on the left, and owners int32 (rows,)."""
        owners = np.zeros(rows, np.int32)  # empty rows get the first prefix
        owners[: len(self.owners)] = self.owners
        return *padded(self.tokens, self.shape, left=True), owners


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts that are answered together: token ids int32 (T,) without their prefixes, padded to a shape (B, T).

    Attributes:
        beginnings: the prefixes of the texts; None if these are whole prompts.
    """

    places: list[int]
    texts: list[np.ndarray]
    shape: tuple[int, int]
    beginnings: Beginnings | None = None

    @property
    def slots(self) -> int:
        """Cache slots per prompt, including its prefix and padding."""
        return self.shape[1] + (0 if self.beginnings is None else self.beginnings.shape[1])

    def count_tokens(self, written: int) -> int:
        """Count the tokens that are read and, in each row, `written`, including padding and empty rows."""
        rows, width = self.shape
        groups, longest = (0, 0) if self.beginnings is None else self.beginnings.shape
        return groups * longest + rows * (width + written)


def writing_cost(texts: int, tokens: int, prompt: float = TEXT) -> Cost:
    """Return the cost of writing up to `tokens` tokens after each of `texts` prompts with a mean length of `prompt`."""
    return Cost(texts, written=-(-texts // WRITING_ROWS) * tokens, source=_PREFILL * texts * prompt)


def plan_batches(
    ids: Sequence[np.ndarray], written: int, *, share: bool, most: int = WRITING_ROWS
) -> list[PromptBatch]:
    """Put prompts into batches of similar length.

    Args:
        ids: int32 (T,) token ids of each prompt, at most `LONGEST_PROMPT`.
        written: maximum number of new tokens per prompt.
        share: whether shared prefixes may be read once; this is done only if it saves enough tokens.
        most: maximum number of prompts in a batch.

    Returns:
        Batches that hold every prompt once, those without shared prefixes first.
    """
    whole = _whole(ids, range(len(ids)), most)
    groups = common_beginnings(ids) if share else []
    if not groups:
        return whole
    grouped = {place for group in groups for place in group.places}
    others = [place for place in range(len(ids)) if place not in grouped]
    shared = [*_whole(ids, others, most), *_behind(ids, groups, most)]
    tokens = [sum(batch.count_tokens(written) for batch in batches) for batches in (shared, whole)]
    return shared if tokens[0] <= _WORTH * tokens[1] else whole


def _whole(ids: Sequence[np.ndarray], places: Sequence[int], rows: int) -> list[PromptBatch]:
    """Put whole prompts into batches, shortest first: every token of padding costs as much as one of text."""
    order, found = sorted(places, key=lambda place: len(ids[place])), []
    while order:
        part, most = order[:rows], rows
        width = rounded(len(ids[part[-1]]))
        if width > _WIDE:
            # Take the narrowest width that fits the shortest prompt, and all prompts that fit in it.
            width = _next_width(len(ids[part[0]]))
            most = max(1, min(rows, _READ // width))
            part = [place for place in part[:most] if len(ids[place]) <= width]
        found.append(PromptBatch(part, [ids[place] for place in part], (_rows(len(part), most), width)))
        order = order[len(part) :]
    return found


def plan_queues(turns: Sequence[PromptBatch], written: int) -> list[tuple[list[PromptBatch], int, int]]:
    """Divide batches among queues of prompts that reuse a cache of one shape, batches with fewer slots first.

    Returns:
        The batches of each queue, the rows of its cache, and the slots per row without those for new tokens.
    """
    found: dict[int, list[PromptBatch]] = {}
    for turn in sorted(turns, key=lambda turn: turn.slots):
        found.setdefault(_next_width(min(turn.slots, LONGEST_PROMPT)), []).append(turn)
    queues = []
    for own in found.values():
        slots = own[-1].slots
        # The cache has at least the rows of the largest batch.
        most = max(*(turn.shape[0] for turn in own), min(WRITING_ROWS, _SLOTS // (slots + rounded(written))))
        queues.append((own, _rows(min(most, sum(len(turn.places) for turn in own)), most), slots))
    return queues


class _Row(NamedTuple):
    """A prompt with a shared prefix. The order of the fields sorts prompts for batching."""

    width: int  # the narrowest that fits the text after the prefix
    beginning: int  # tokens of the prefix
    group: int
    text: int  # tokens after the prefix
    place: int


def _behind(ids: Sequence[np.ndarray], groups: Sequence[Group], most: int) -> list[PromptBatch]:
    """Put the prompts of groups into batches; prompts of a group with similar lengths stay together."""
    rows = sorted(
        _Row(_next_width(text := len(ids[place]) - group.length), group.length, number, text, place)
        for number, group in enumerate(groups)
        for place in group.places
    )
    found = []
    while rows:
        count, shapes = 1, _shapes(rows[:1], most)
        while count < len(rows) and (larger := _shapes(rows[: count + 1], most)) is not None:
            count, shapes = count + 1, larger
        assert shapes is not None  # a single prompt always fits
        found.append(_batch(ids, rows[:count], *shapes))
        rows = rows[count:]
    return found


def _shapes(rows: Sequence[_Row], limit: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the shapes (G, P) of the prefixes and (B, T) of the texts of a batch; None if the rows do not fit one."""
    longest, width = _width(rows[-1].beginning), _width(max(row.text for row in rows))
    groups, most = len({row.group for row in rows}), min(limit, _READ // width, _SLOTS // (longest + width))
    padded_groups = next((count for count in _BEGINNINGS if groups <= count), None)
    # A prefix is not padded to more than `_WIDE` or twice its length.
    alike = rows[0].width == rows[-1].width and longest <= max(_WIDE, 2 * rows[0].beginning)
    if padded_groups is None or padded_groups * longest > _READ or len(rows) > most or not alike:
        return None
    return (padded_groups, longest), (_rows(len(rows), most), width)


def _batch(
    ids: Sequence[np.ndarray], rows: Sequence[_Row], beginnings: tuple[int, int], shape: tuple[int, int]
) -> PromptBatch:
    groups = {row.group: row for row in rows}
    order = list(groups)
    tokens = [ids[row.place][: row.beginning] for row in groups.values()]
    texts = [ids[row.place][row.beginning :] for row in rows]
    owners = [order.index(row.group) for row in rows]
    return PromptBatch([row.place for row in rows], texts, shape, Beginnings(tokens, owners, beginnings))


def _rows(count: int, most: int) -> int:
    return min(most, next(rows for rows in _ROWS if count <= rows))


def _next_width(tokens: int) -> int:
    """Return the narrowest width that fits; a prompt with tokens already written may exceed `LONGEST_PROMPT`."""
    longer = -(-tokens // _WIDTHS[0]) * _WIDTHS[0]
    return next((width for width in (_WIDE, *_WIDTHS) if tokens <= width), longer)


def _width(tokens: int) -> int:
    return rounded(tokens) if tokens <= _WIDE else _next_width(tokens)


def rounded(tokens: int) -> int:
    """Round a number of tokens up to a multiple of `_MULTIPLE`, so that few shapes are compiled."""
    return -(-tokens // _MULTIPLE) * _MULTIPLE


def padded(
    prompts: Sequence[Sequence[int] | np.ndarray], shape: tuple[int, int], left: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens int32 and mask (B, T); a row without a prompt gets one token, because no row may be empty."""
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    mask[len(prompts) :, -1 if left else 0] = True
    for row, prompt in enumerate(prompts):
        place = slice(shape[1] - len(prompt), None) if left else slice(len(prompt))
        tokens[row, place], mask[row, place] = prompt, True
    return tokens, mask


def common_beginnings(ids: Sequence[np.ndarray]) -> list[Group]:
    """Group prompts (token ids int32 (T,) each) by shared prefixes.

    A group is divided into groups with longer prefixes if that saves more tokens.

    Returns:
        Disjoint groups, ordered by their first prompts unless divided. Prompts that share no prefix are in none.
    """
    return [group for part in _alike(ids, range(len(ids)), 0, SHORTEST) for group in _divided(ids, part)]


def _divided(ids: Sequence[np.ndarray], places: list[int]) -> list[Group]:
    """Return one group of prompts with a shared prefix, or several with longer prefixes if that saves more tokens."""
    whole = Group(places, _common_length([ids[place] for place in places]))
    finer = [group for part in _alike(ids, places, whole.length, _MULTIPLE) for group in _divided(ids, part)]
    inside = {place for group in finer for place in group.places}
    others = [place for place in places if place not in inside]
    finer += [Group(others, whole.length)] if len(others) > 1 else []
    return finer if sum(group.saved for group in finer) > whole.saved else [whole]


def _alike(ids: Sequence[np.ndarray], places: Iterable[int], start: int, count: int) -> list[list[int]]:
    """Group prompts that have the same `count` tokens from `start` on and at least one token after them."""
    found: dict[bytes, list[int]] = {}
    for place in places:
        if len(ids[place]) > start + count:
            found.setdefault(ids[place][start : start + count].tobytes(), []).append(place)
    return [part for part in found.values() if len(part) > 1]


def _common_length(prompts: Sequence[np.ndarray]) -> int:
    """Return the length of the shared prefix, rounded down to `_MULTIPLE`; every prompt has a token after it."""
    first, length = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        unequal = np.flatnonzero(prompt[:length] != first[:length])
        length = int(unequal[0]) if len(unequal) else length
    return length // _MULTIPLE * _MULTIPLE
