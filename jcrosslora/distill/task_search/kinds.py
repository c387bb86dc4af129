"""Common kinds of tasks, and the choice of the kind that an adapter was trained on."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import msgspec
import numpy as np

from jcrosslora.distill.task_search.answers import ScoredAnswer, common_odds, common_score, overlap, pieces

ANSWERS = 2  # to each request in a turn
_TURNS = 6  # at most
_LEAST_ODDS = 0.5  # a kind stays in the running with this share of the highest odds
# A lead over the other kinds that decides after one turn; it falls with the root of the number of turns, as noise does.
_CLEAR = 0.3
_LOOK = 0.7  # weight of the gain in likeness; the odds have 1
_KEY = re.compile(r"\w[\w /-]*")
_Record = tuple[tuple[str, str], ...]  # keys with values


@dataclass(frozen=True)
class Notation:
    """A way to write a record of keys and values: an adapter knows the one that it was trained on.

    A colon stands between a key and its value, a comma between a value and the next key.
    """

    before: str
    colon: str
    close: str
    comma: str
    after: str

    def write(self, record: _Record) -> str:
        """Write a record."""
        pairs = self.comma.join(f"{key}{self.colon}{value}{self.close}" for key, value in record)
        return self.before + pairs + self.after

    def read(self, text: str) -> _Record | None:
        """Read what `write` writes; return None for any other text."""
        inner = text.removeprefix(self.before).removesuffix(self.after)
        parts = [part.removesuffix(self.close).partition(self.colon) for part in inner.split(self.comma)]
        record = tuple((key, value) for key, _, value in parts)
        named = all(_KEY.fullmatch(key) and value for key, value in record)
        return record if named and self.write(record) == text else None


PLAIN = Notation("", ": ", "", ", ", "")
NOTATIONS = (
    PLAIN,
    Notation("", " = ", "", "; ", ""),
    Notation('{"', '": "', '"', ', "', "}"),
    Notation("", "(", ")", ", ", ""),
    Notation("", " | ", "", " & ", ""),
)


@dataclass(frozen=True)
class JobKind:
    """A kind of job.

    Attributes:
        instructions: texts that may stand in front of an input, with the space or line break between; "" is none.
        examples: inputs of one form, each a single line, with possible answers.
        records: whether inputs are records of facts. Requests then take turns in several notations.
    """

    name: str
    instructions: tuple[str, ...]
    examples: tuple[tuple[str, str], ...]
    records: bool = False

    @property
    def inputs(self) -> list[str]:
        """The inputs of the examples."""
        return [text for text, _ in self.examples]

    @property
    def requests(self) -> list[str]:
        """The requests of the examples."""
        return self.ask_for(self.inputs)

    def ask_for(self, inputs: Iterable[str]) -> list[str]:
        """Make requests of inputs; the instructions take turns."""
        return [self.request(text, turn) for turn, text in enumerate(inputs)]

    def request(self, text: str, turn: int) -> str:
        """Put the instruction of a turn in front of an input."""
        return self.instructions[turn % len(self.instructions)] + (write_in(text, turn) if self.records else text)

    def input_of(self, request: str) -> str:
        """Return the input of a request of this kind."""
        known = sorted(self.instructions, key=len, reverse=True)
        text = request.removeprefix(next(one for one in known if request.startswith(one)))
        return write_plain(text) if self.records else text

    def answers_in(self, answered: Sequence[ScoredAnswer]) -> list[ScoredAnswer]:
        """Take the answers to the requests of the examples."""
        requests = set(self.requests)
        return [one for one in answered if one.text in requests]


def write_in(text: str, turn: int) -> str:
    """Write a record in plain notation in one of `NOTATIONS`, which take turns; other text stays as it is."""
    record = PLAIN.read(text)
    return text if record is None else NOTATIONS[turn % len(NOTATIONS)].write(record)


def write_plain(text: str) -> str:
    """Write a record in any of `NOTATIONS` in plain notation; other text stays as it is."""
    found = (notation.read(text) for notation in NOTATIONS)
    record = next((one for one in found if one is not None), None)
    return text if record is None else PLAIN.write(record)


KINDS = msgspec.json.decode((files("jcrosslora") / "data" / "job_kinds.json").read_bytes(), type=tuple[JobKind, ...])


def choose_kind(
    probed: Sequence[ScoredAnswer],
    ask: Callable[[Sequence[str], int], list[ScoredAnswer]],
    ask_base: Callable[[Sequence[str], int], list[tuple[str, str]]],
) -> list[tuple[JobKind, float]]:
    """Rank the kinds of tasks by the answers to their requests, the adapter's probable kind first.

    That kind has the highest sum of two figures: its odds relative to the highest odds, and how much more the adapter's
    answers look like those of the examples than the base's answers do. The second figure is for adapters that answer
    everything in their own way: they are nearly as sure of several kinds, but their answers look like one. Kinds near
    the best get more answers, until one leads clearly or the turns are used up.

    `probed` holds up to `ANSWERS` answers to each request of every kind, at least one in all. The two functions answer
    the requests of a turn, with the adapter and without it.

    Returns:
        The kinds that have answers, with the answers' common scores; sorted by score after the first.
    """
    every, plain, near = list(probed), list[tuple[str, str]](), list(KINDS)
    for turn in range(1, _TURNS + 1):
        if turn > 1:
            every += ask(_requests(near) * ANSWERS, turn)
        odds = {kind: common_odds(kind.answers_in(every)) for kind in near}
        near = [kind for kind in near if odds[kind] >= _LEAST_ODDS * max(odds.values())]
        if len(near) == 1:
            break
        plain += ask_base(_requests(near), turn)
        gains = {kind: _LOOK * _likeness_gain(kind, every, plain) for kind in near}
        ratings = {kind: odds[kind] / (max(odds.values()) or 1.0) + gains[kind] for kind in near}
        near.sort(key=lambda kind: -ratings[kind])
        near = [kind for kind in near if ratings[kind] >= ratings[near[0]] - _CLEAR / turn**0.5]
        if len(near) == 1:
            break
    scores = {kind: common_score(found) for kind in KINDS if (found := kind.answers_in(every))}
    ranked = [*near[:1], *sorted(scores, key=lambda kind: -scores[kind])]
    return [(kind, scores[kind]) for kind in dict.fromkeys(ranked) if kind in scores]


def likeness(first: str, second: str) -> float:
    """Compare the format of two texts, 0 to 1: their punctuation, and where letters and digits stand in it."""
    shapes = (re.sub(r"\d+", "0", re.sub(r"[^\W\d_]+", "a", text)) for text in (first, second))
    return overlap(*(pieces(shape, 3) for shape in shapes))


def _likeness_gain(kind: JobKind, probed: Sequence[ScoredAnswer], plain: Sequence[tuple[str, str]]) -> float:
    """Return how much more the adapter's answers look like those of the examples than the base's do."""
    own = [one.item.answer for one in kind.answers_in(probed)]
    others = [answer for request, answer in plain if request in kind.requests]
    # Each answer is compared with the example's answer that is most like it.
    looks = ([max(likeness(one, known) for _, known in kind.examples) for one in side] for side in (own, others))
    gain, base = (float(np.mean(side)) if side else 0.0 for side in looks)
    return gain - base


def _requests(kinds: Sequence[JobKind]) -> list[str]:
    return [request for kind in kinds for request in kind.requests]
