"""What an adapter that puts records into words was trained on: the subjects that it knows best.

A sentence that is made of data speaks of what stands in them, so it does not tell what the adapter was trained on. How
much the adapter changes it does: it knows how a restaurant is described, or how a match is reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.distill.discovery.facts import SUBJECTS
from jcrosslora.distill.discovery.scores import Scored

_TURNS = 4  # of answers, after each of which the worse half of the subjects is left out
_LEFT = 4  # subjects, at least
# Standard deviation of the change of answers about the same subject, over the mean change.
_SPREAD = 0.3


@dataclass(frozen=True)
class KnownSubjects:
    """Subjects that an adapter may know best.

    Attributes:
        names: the best first.
        means: change that the adapter makes to the base's predictions in answers about each, in nats a token.
        errors: standard errors of these.
    """

    names: list[str]
    means: list[float]
    errors: list[float]

    def choose(self, count: int, seed: int) -> list[str]:
        """Choose what records are to be about: a subject the more often, the surer it is that it has the most change.

        By Thompson sampling: for each record the changes of all subjects are drawn, as far as the answers leave them
        open, and the subject with the largest is taken.
        """
        drawn = np.random.default_rng(seed).normal(self.means, self.errors, (count, len(self.names)))
        return [self.names[place] for place in drawn.argmax(axis=1).tolist()]


def find_subjects(ask: Callable[[Sequence[str], int], list[tuple[str, Scored]]], count: int) -> KnownSubjects:
    """Find the subjects of records that an adapter knows best, by successive halving.

    Of these it changes the predictions of the base most. Of records of the same kind of jobs this tells one subject
    from another by fewer answers than their scores do.

    Args:
        ask: answers records about the given subjects, and returns the answers with these subjects; the number is that
            of the turn.
        count: answers of a turn, or a few more, as each subject left has equally many.
    """
    left, answers = list(SUBJECTS), defaultdict(list)

    def mean(subject: str) -> float:
        own = answers[subject]
        return sum(one.change for one in own) / max(1, sum(one.tokens for one in own))

    for turn in range(_TURNS):
        for subject, answer in ask(left * -(-count // len(left)), turn):
            answers[subject].append(answer)
        left = sorted(left, key=mean, reverse=True)[: max(_LEFT, len(left) // 2)]
    means = [mean(subject) for subject in left]
    typical = _SPREAD * sum(means) / len(means)
    return KnownSubjects(left, means, [typical / max(1, len(answers[subject])) ** 0.5 for subject in left])
