"""How often retrievers find the right adapter, on prompts whose adapters are known."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.errors import UsageError
from jcrosslora.evaluate.bootstrap import Interval, intervals
from jcrosslora.shelf.retrieval.retrieved import Retrieved

_TOP = 3


@dataclass(frozen=True)
class Accuracy:
    """The figures of one retriever, shares of prompts with 95% intervals.

    Attributes:
        top1: an adapter of the task has the best score.
        top3: one is among the three best.
        answered: one is accepted and the best of those; the rest gets the base alone or another adapter.
        false: prompts of no adapter's task that get one all the same; None without such prompts.
    """

    top1: Interval
    top3: Interval
    answered: Interval
    false: Interval | None


def accuracy(found: Retrieved, wanted: Sequence[Collection[str]]) -> Accuracy:
    """Judge a search.

    Args:
        found: for P prompts.
        wanted: for each prompt the adapters of its task; none where the base alone is right.

    Raises:
        UsageError: another number of prompts, no prompt with an adapter, or a name that is not on the shelf.
    """
    if unknown := {name for names in wanted for name in names} - set(found.names):
        msg = f"the shelf has no adapter {min(unknown)!r}; `jcrosslora shelf list` names all"
        raise UsageError(msg)
    if len(wanted) != len(found.scores) or not any(wanted):
        msg = f"{len(wanted)} labels, {sum(map(bool, wanted))} with an adapter, for {len(found.scores)} prompts: "
        raise UsageError(msg + "wanted one for each, and an adapter for some")
    right = np.array([[name in names for name in found.names] for names in wanted], bool)
    used: np.ndarray = found.weights() > 0
    known = np.any(right, axis=1)
    hit = np.take_along_axis(right, found.ranked(_TOP), axis=1)
    figures = np.stack([hit[:, 0], hit.any(axis=1), (right & used).any(axis=1)]).astype(np.float64)[:, known]
    false = np.any(used, axis=1)[~known].astype(np.float64)
    top1, top3, answered = intervals(figures)
    return Accuracy(top1, top3, answered, intervals(false[None])[0] if len(false) else None)
