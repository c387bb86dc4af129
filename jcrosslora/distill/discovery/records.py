"""Records of facts, as an adapter is asked to put them into words."""

from collections.abc import Collection, Sequence

import numpy as np

from jcrosslora.distill.discovery.facts import FACTS, NAMES, PEOPLE, SUBJECTS
from jcrosslora.distill.discovery.near_duplicates import distinct
from jcrosslora.distill.discovery.notations import PLAIN

_FEWEST = 2  # facts of a record beside its name and kind
_PEOPLE = 0.2  # share of names that are those of people


def make_records(subjects: Sequence[str], seed: int, earlier: Collection[str] = ()) -> dict[str, str]:
    """Make a record about each of the subjects, of some of the facts that are often told of it.

    Args:
        subjects: of `SUBJECTS`.
        seed: of the choice.
        earlier: records, of which near-duplicates are left out, as they are of each other.

    Returns:
        The subjects by the records in plain notation.
    """
    rng, records = np.random.default_rng(seed), []
    for subject in subjects:
        keys = rng.permutation(SUBJECTS[subject]).tolist()
        facts = [(key, str(rng.choice(FACTS[key]))) for key in keys[: rng.integers(_FEWEST, len(keys) + 1)]]
        records.append(PLAIN.write((("name", _name(rng)), ("kind", subject), *facts)))
    return {records[place]: subjects[place] for place in distinct(records, earlier)}


def _name(rng: np.random.Generator) -> str:
    if rng.random() < _PEOPLE:
        return str(rng.choice(PEOPLE))
    return " ".join(str(rng.choice(words)) for words in NAMES)
