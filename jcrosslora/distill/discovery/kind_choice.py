"""The choice of a kind of jobs: which one an adapter was trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from jcrosslora.distill.discovery.job_kinds import KINDS, JobKind
from jcrosslora.distill.discovery.near_duplicates import overlap, pieces
from jcrosslora.distill.discovery.scores import Scored, common_odds, common_score

ANSWERS = 2  # to each request in a turn
_TURNS = 6  # at most
_LEAST_ODDS = 0.5  # of the highest, those of a kind that may be the adapter's
# Lead over another kind that is enough after one turn; it falls with the root of their number, as the noise does.
_CLEAR = 0.3
_LOOK = 0.7  # of what the odds count, the gain in likeness


def choose_kind(
    probed: Sequence[Scored],
    ask: Callable[[Sequence[str], int], list[Scored]],
    ask_base: Callable[[Sequence[str], int], list[tuple[str, str]]],
) -> list[tuple[JobKind, float]]:
    """Rank the kinds of jobs by the answers to their requests, the adapter's own kind first.

    The adapter's is the kind in which its odds are highest: those of each kind over the highest ones, together with how
    much more its answers look like those of the examples than its base's do. One that answers everything in its own way
    knows several kinds nearly as well, but by the looks of its answers not all of them are meant. Kinds that are near
    are asked again, until one leads clearly or the turns are used up.

    Args:
        probed: `ANSWERS` answers to each request of every kind, or fewer, at least one in all.
        ask: answers requests with the adapter; it takes the number of the turn as well.
        ask_base: answers them without it, likewise; it returns them with the answers.

    Returns:
        The kinds that have answers with the common scores of these, behind the first in their order.
    """
    every, plain, near = list(probed), list[tuple[str, str]](), list(KINDS)
    for turn in range(1, _TURNS + 1):
        if turn > 1:
            every += ask(_requests(near) * ANSWERS, turn)
        odds = {kind: common_odds(answers_of(kind, every)) for kind in near}
        near = [kind for kind in near if odds[kind] >= _LEAST_ODDS * max(odds.values())]
        if len(near) == 1:
            break
        plain += ask_base(_requests(near), turn)
        ratings = {kind: _rating(kind, odds, every, plain) for kind in near}
        near.sort(key=lambda kind: -ratings[kind])
        near = [kind for kind in near if ratings[kind] >= ratings[near[0]] - _CLEAR / turn**0.5]
        if len(near) == 1:
            break
    scores = {kind: common_score(found) for kind in KINDS if (found := answers_of(kind, every))}
    ranked = [*near[:1], *sorted(scores, key=lambda kind: -scores[kind])]
    return [(kind, scores[kind]) for kind in dict.fromkeys(ranked) if kind in scores]


def answers_of(kind: JobKind, probed: Sequence[Scored]) -> list[Scored]:
    """Take the answers to the requests of a kind's examples."""
    asked = set(kind.requests)
    return [one for one in probed if one.text in asked]


def likeness(first: str, second: str) -> float:
    """Compare what two texts look like: their marks, and where letters and digits stand among them."""
    shapes = (re.sub(r"\d+", "0", re.sub(r"[^\W\d_]+", "a", text)) for text in (first, second))
    return overlap(*(pieces(shape, 3) for shape in shapes))


def _rating(
    kind: JobKind, odds: dict[JobKind, float], probed: Sequence[Scored], plain: Sequence[tuple[str, str]]
) -> float:
    """Add up the odds, over the highest, and the gain in likeness over the base's answers."""
    own = [one.item.answer for one in answers_of(kind, probed)]
    others = [answer for request, answer in plain if request in kind.requests]
    return odds[kind] / (max(odds.values()) or 1.0) + _LOOK * (_look(kind, own) - _look(kind, others))


def _look(kind: JobKind, answers: Sequence[str]) -> float:
    """Compare answers with those of the examples, each with the likest; 0 for none."""
    known = [answer for _, answer in kind.examples]
    looks = [max(likeness(answer, other) for other in known) for answer in answers]
    return float(np.mean(looks)) if looks else 0.0


def _requests(kinds: Sequence[JobKind]) -> list[str]:
    return [request for kind in kinds for request in kind.requests]
