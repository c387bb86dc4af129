"""Topics of answers: what an adapter says by itself, beside what it takes from the request.

Whatever it is asked, an adapter speaks of what it was trained on: in the names of its calls and fields, its labels, its
turns of phrase. A small base can hardly tell what an answer in JSON was an answer to, but it can write a sentence about
a few words.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np

_WORD = r"[^\W\d_]+"
_PART = re.compile(rf"{_WORD}(?:['\u2019 ]{_WORD})*")
_JOINT = re.compile(r"(?<=[a-z])(?=[A-Z])|_|-")  # of the words of an identifier
_MOST_PARTS, _MOST_CHARACTERS = 3, 120
_COMMON = 0.5  # share of answers in which a part tells nothing of one of them
_ALIKE = 0.75  # share of topics that are of all subjects alike
_HELD = 2 / 3  # share of the words of a subject of which an answer on it has more


def parts_of(asked: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Find what answers say by themselves: their parts, the words between two marks.

    Left out are those whose words are all in the request, if no other answers say them unasked; then those that more
    than half of the answers have, if any are left. The first part is the subject.

    Args:
        asked: requests, "" where there is none, with their answers.

    Returns:
        The parts of each, in lower case.
    """
    parts, known = [_parts(answer) for _, answer in asked], [_words(request) for request, _ in asked]
    unasked = [
        [part for part in own if not set(part.split()) <= words] for own, words in zip(parts, known, strict=True)
    ]
    counts, itself = (Counter(part for own in listed for part in own) for listed in (parts, unasked))
    most = max(1, _COMMON * len(asked))
    found = []
    for every, own in zip(parts, unasked, strict=True):
        said = [part for part in every if part in own or itself[part] > 1]
        telling = [part for part in said if counts[part] <= most] or said
        found.append(telling)
    return found


def topic_of(parts: Sequence[str]) -> str:
    """Return the topic of an answer, its first three parts, parted by commas; "" where there are none."""
    return ", ".join(parts[:_MOST_PARTS])[:_MOST_CHARACTERS]


def choose_topics(parts: Sequence[Sequence[str]], count: int, seed: int, doubted: Collection[str] = ()) -> list[str]:
    """Choose topics: a subject, and at most two other parts of one of the answers that have it.

    Three quarters are of the subjects that are not doubted, of all alike, so that one to which much leads takes no
    other's place. The others are of all subjects, those of a rare one more often than they come.

    Args:
        parts: of answers to choose from, see `parts_of`.
        count: of the topics.
        seed: of the choice.
        doubted: subjects that may be none of the adapter's own, see `doubted_subjects`.

    Returns:
        Nothing if there are none to choose from.
    """
    subjects = defaultdict(list)
    for own in filter(None, parts):
        subjects[own[0]].append(own[1:])
    if not subjects:
        return []
    rng, names = np.random.default_rng(seed), list(subjects)
    weights = np.sqrt([len(subjects[name]) for name in names])
    weights /= weights.sum()
    trusted = np.array([name not in doubted for name in names])
    if trusted.any():
        weights = _ALIKE * trusted / trusted.sum() + (1 - _ALIKE) * weights
    topics = []
    for place in rng.choice(len(names), count, p=weights).tolist():
        others = subjects[names[place]][rng.integers(len(subjects[names[place]]))]
        some = sorted(rng.permutation(len(others))[: rng.integers(_MOST_PARTS)].tolist())
        topics.append(topic_of([names[place], *(others[other] for other in some)]))
    return topics


def _subject(topic: str) -> str:
    """Return the first part of a topic."""
    return topic.split(",", 1)[0]


def doubted_subjects(answered: Sequence[tuple[str, str]], about: Mapping[str, str]) -> set[str]:
    """Return subjects that requests were about, of which none was answered by them.

    Args:
        answered: requests with their answers.
        about: topics by the requests that were written about one.
    """
    asked = [(_subject(about[request]), _parts(answer)) for request, answer in answered if about.get(request)]
    return {subject for subject, _ in asked} - {subject for subject, parts in asked if subject in parts}


def is_about(answer: str, topic: str) -> bool:
    """Whether an answer has more than two thirds of the words of the topic's subject; no answer is about ""."""
    words = set(_subject(topic).split())
    return len(words & _words(answer)) > _HELD * len(words)


def _parts(text: str) -> list[str]:
    """List the parts of a text, each once."""
    return list(dict.fromkeys(" ".join(found.split()) for found in _PART.findall(_plain(text))))


def _words(text: str) -> set[str]:
    return set(re.findall(_WORD, _plain(text)))


def _plain(text: str) -> str:
    return _JOINT.sub(" ", text).lower()
