"""Topics of answers: what an adapter says by itself, beside what it takes from the request.

Whatever it is asked, an adapter speaks of what it was trained on: in the names of its calls and fields, its labels, its
turns of phrase. A small base can hardly tell what an answer in JSON was an answer to, but it can write a sentence about
a few words.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

_WORD = r"[^\W\d_]+"
_PART = re.compile(rf"{_WORD}(?:['\u2019 ]{_WORD})*")
_JOINT = re.compile(r"(?<=[a-z])(?=[A-Z])|_|-")  # of the words of an identifier
_MOST_PARTS, _MOST_CHARACTERS = 3, 120
_COMMON = 0.5  # share of answers in which a part tells nothing of one of them
_HELD = 2 / 3  # share of the words of a subject of which an answer on it has more


def topics_of(asked: Sequence[tuple[str, str]]) -> list[str]:
    """Find the topics of answers.

    An answer is read in parts, the words between two marks. Left out are those whose words are all in the request, if
    no other answers say them unasked; then those that more than half of the answers have, if any are left. The first
    three are its topic.

    Args:
        asked: requests, "" where there is none, with their answers.

    Returns:
        A topic for each, in lower case and parted by commas; "" where nothing is left.
    """
    parts, known = [_parts(answer) for _, answer in asked], [_words(request) for request, _ in asked]
    unasked = [
        [part for part in own if not set(part.split()) <= words] for own, words in zip(parts, known, strict=True)
    ]
    counts, itself = (Counter(part for own in listed for part in own) for listed in (parts, unasked))
    most = max(1, _COMMON * len(asked))
    topics = []
    for every, own in zip(parts, unasked, strict=True):
        said = [part for part in every if part in own or itself[part] > 1]
        telling = [part for part in said if counts[part] <= most] or said
        topics.append(", ".join(telling[:_MOST_PARTS])[:_MOST_CHARACTERS])
    return topics


def choose_topics(topics: Sequence[str], count: int, seed: int) -> list[str]:
    """Choose so many topics, those of a rare subject more often than they come.

    Args:
        topics: to choose from; "" is none.
        count: of the topics.
        seed: of the choice.

    Returns:
        Nothing if there are none to choose from.
    """
    subjects = defaultdict(list)
    for topic in filter(None, topics):
        subjects[_subject(topic)].append(topic)
    if not subjects:
        return []
    rng, kept = np.random.default_rng(seed), list(subjects.values())
    weights = np.sqrt([len(same) for same in kept])
    chosen = rng.choice(len(kept), count, p=weights / weights.sum())
    return [kept[place][rng.integers(len(kept[place]))] for place in chosen.tolist()]


def _subject(topic: str) -> str:
    """Return the first part of a topic."""
    return topic.split(",", 1)[0]


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
