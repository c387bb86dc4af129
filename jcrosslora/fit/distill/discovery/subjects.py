"""Subjects of records: what data are often about, and which of it an adapter was trained on.

A sentence that is made of data speaks of what stands in them, so it does not tell what the adapter was trained on. How
sure the adapter is of it does: it knows how a restaurant is described, or how a match is reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from jcrosslora.fit.distill.discovery.scores import Scored, common_score

SUBJECTS = (
    *("person", "animal", "plant", "planet", "car", "ship", "phone", "software"),
    *("film", "song", "book", "game", "clothes", "house", "medicine", "recipe"),
    *("restaurant", "hotel", "museum", "airport", "school", "hospital", "shop", "company"),
    *("job offer", "event", "match", "team", "city", "weather"),
)
_PRIOR = 4  # answers that score as all together, which count with those about each subject
# Standard deviation of the scores of single answers over the common score: about half of what was measured, as there
# are too few requests to make sure of every subject.
_SPREAD = 0.2


def choose_subjects(answered: Iterable[tuple[str, Scored]], count: int, seed: int) -> list[str]:
    """Choose what requests are to be about: often what the adapter is surest of, and at first all of `SUBJECTS`.

    By Thompson sampling: for each request the scores of all subjects are drawn, as far as their answers leave them
    open, and the subject with the highest is taken.

    Args:
        answered: subjects that were asked about, with the answers.
        count: of the requests.
        seed: of the choice.
    """
    rng, found = np.random.default_rng(seed), defaultdict(list)
    for subject, answer in answered:
        found[subject].append(answer)
    every = [one for same in found.values() for one in same]
    if not every:
        order = rng.permutation(len(SUBJECTS))
        return [SUBJECTS[order[place % len(SUBJECTS)]] for place in range(count)]
    names = [*dict.fromkeys([*SUBJECTS, *found])]
    counts = np.array([len(found[name]) for name in names])
    scores = np.array([common_score(found[name]) for name in names])
    common = max(0.0, common_score(every))
    means = (counts * scores + _PRIOR * common) / (counts + _PRIOR)
    errors = _SPREAD * common / np.sqrt(counts + _PRIOR)
    best = rng.normal(means, errors, (count, len(names))).argmax(axis=1)
    return [names[place] for place in best.tolist()]
