"""Sample text with the adapter's change amplified, and find the topics of its answers.

An adapter that was trained on one instruction does its task for few other prompts. With its change amplified it begins
any text as it was trained to. A whole text written this way degenerates, so only the first tokens are amplified, and
the adapter continues normally.

The answers of an adapter contain words of its training data, whatever the request: names of calls and fields, labels,
phrases. A small base cannot guess the request from an answer in JSON, but it can write a sentence about a few words.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.sources import Source
from jcrosslora.distill.task_search.answers import distinct, score
from jcrosslora.distill.templates import PromptTemplate, compare, comparing_cost
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track

# Strengths, each with the number of amplified tokens: the stronger, the sooner a text degenerates. Tokens that are less
# plausible are noise.
_STRENGTHS, _PLAUSIBLE = ((2.0, 8), (4.0, 4)), 1e-3
_SAMPLE = 32  # tokens of a whole sample
_JUDGED = 8  # tokens by which beginnings are judged
_WORD = r"[^\W\d_]+"
_PART = re.compile(rf"{_WORD}(?:['\u2019 ]{_WORD})*")
_JOINT = re.compile(r"(?<=[a-z])(?=[A-Z])|_|-")  # of the words of an identifier
_MOST_PARTS, _MOST_CHARACTERS = 3, 120
_COMMON = 0.5  # a part in more than this share of the answers says nothing about one of them
_EVENLY = 0.75  # share of topics that are chosen with all subjects equally likely
_HELD = 2 / 3  # an answer with more of the words of a subject is about it


def starts(tokenizer: Tokenizer, templates: Sequence[PromptTemplate], requests: Sequence[str], count: int) -> list[str]:
    """List `count` starts for amplified samples; none if there is neither a template nor a BOS token.

    The templates take turns, each with three starts after a request (empty when these are used up) and one before it;
    then comes the start of a plain text.
    """
    waiting = iter(requests)

    def every() -> Iterator[str]:
        while templates or tokenizer.bos is not None:
            for template in templates:
                yield from (template.before + next(waiting, "") + template.after for _ in range(3))
                # An empty start gives no token to continue from, unless there is a BOS token.
                if template.before or tokenizer.bos is not None:
                    yield template.before
            if tokenizer.bos is not None:
                yield ""

    return [start for start, _ in zip(every(), range(count), strict=False)]


def sample_amplified(source: Source, starts: Sequence[str], seed: int, bar: Track | None = None) -> list[Completion]:
    """Sample a text from each start with the adapter's change amplified, once with each strength.

    Returns the best samples first (see `score`), without near-duplicates. The bar advances by three for each start.
    """
    key, begun = jax.random.key(seed), []
    for number, (strength, tokens) in enumerate(_STRENGTHS):
        loud = source.amplified(strength, _PLAUSIBLE)
        written = loud.write(starts, tokens, 1.0, jax.random.fold_in(key, number), bar=bar)
        begun += [Completion(start, one.text) for start, one in zip(starts, written, strict=True) if one.text.strip()]
    # Only the better half is worth going on with.
    begun = _ranked(source, begun, _JUDGED)[: len(starts)]
    rest = source.write([item.text for item in begun], _SAMPLE - _JUDGED, 1.0, jax.random.fold_in(key, 9), bar=bar)
    whole = [replace(item, answer=item.answer + one.text) for item, one in zip(begun, rest, strict=True)]
    ranked = _ranked(source, whole, _SAMPLE)
    return [ranked[place] for place in distinct([item.answer for item in ranked])]


def amplified_cost(starts: int) -> Cost:
    """Count `sample_amplified`: amplified tokens need the source with its adapter and without."""
    begun = [writing_cost(starts, tokens) + comparing_cost(starts) for _, tokens in _STRENGTHS]
    alone = [replace(writing_cost(starts, tokens), texts=0) for _, tokens in _STRENGTHS]
    return sum([*begun, *alone], writing_cost(starts, _SAMPLE - _JUDGED) + comparing_cost(starts))


def _ranked(source: Source, items: Sequence[Completion], tokens: int) -> list[Completion]:
    if not items:
        return []
    change, base_nll, _ = compare(source, items, tokens)
    return [items[place] for place in (-score(change, base_nll)).argsort(kind="stable").tolist()]


def parts_of(asked: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Find the phrases of answers that do not come from the request: the words between punctuation, in lower case.

    A phrase is dropped if its words are all in the request ("" without one) and no other answer has it without being
    asked; and, if others remain, if more than half of the answers have it. The first phrase is the subject.
    """
    parts, known = [_parts(answer) for _, answer in asked], [_words(request) for request, _ in asked]
    unasked = [
        [part for part in own if not set(part.split()) <= words] for own, words in zip(parts, known, strict=True)
    ]
    counts, itself = (Counter(part for own in listed for part in own) for listed in (parts, unasked))
    most = max(1, _COMMON * len(asked))
    said = [
        [part for part in every if part in own or itself[part] > 1] for every, own in zip(parts, unasked, strict=True)
    ]
    return [[part for part in one if counts[part] <= most] or one for one in said]


def topic_of(parts: Sequence[str]) -> str:
    """Return the topic of an answer, its first three phrases with commas between; "" without phrases."""
    return ", ".join(parts[:_MOST_PARTS])[:_MOST_CHARACTERS]


def choose_topics(parts: Sequence[Sequence[str]], count: int, seed: int, doubted: Collection[str] = ()) -> list[str]:
    """Choose topics: a subject, and at most two other phrases of one of its answers.

    Three quarters of the topics use every subject that is not doubted equally often, so that a frequent one does not
    displace the others. The rest are drawn from all subjects, by the root of their frequency.

    `parts` are the phrases of each answer, see `parts_of`; without subjects no topic is chosen. Doubted subjects may
    not belong to the adapter's task, see `doubted_subjects`.
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
        weights = _EVENLY * trusted / trusted.sum() + (1 - _EVENLY) * weights
    topics = []
    for place in rng.choice(len(names), count, p=weights).tolist():
        others = subjects[names[place]][rng.integers(len(subjects[names[place]]))]
        some = sorted(rng.permutation(len(others))[: rng.integers(_MOST_PARTS)].tolist())
        topics.append(topic_of([names[place], *(others[other] for other in some)]))
    return topics


def _subject(topic: str) -> str:
    return topic.split(",", 1)[0]


def doubted_subjects(answered: Sequence[tuple[str, str]], about: Mapping[str, str]) -> set[str]:
    """Return the subjects, among the topics of requests, that occur as a phrase in no answer.

    `answered` are pairs of a request and its answer.
    """
    asked = [(_subject(about[request]), _parts(answer)) for request, answer in answered if about.get(request)]
    return {subject for subject, _ in asked} - {subject for subject, parts in asked if subject in parts}


def is_about(answer: str, topic: str) -> bool:
    """Whether an answer has more than two thirds of the words of the topic's subject; no answer is about ""."""
    words = set(_subject(topic).split())
    return len(words & _words(answer)) > _HELD * len(words)


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(" ".join(found.split()) for found in _PART.findall(_plain(text))))


def _words(text: str) -> set[str]:
    return set(re.findall(_WORD, _plain(text)))


def _plain(text: str) -> str:
    return _JOINT.sub(" ", text).lower()
