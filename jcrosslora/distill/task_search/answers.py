"""Put requests to the adapter, and score how typical its answers are of what it was trained on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.sources import Source
from jcrosslora.distill.templates import ChatTemplate, PromptTemplate, Sampler, compare, comparing_cost, templates_of
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track

ANSWER_TOKENS = 24  # of an answer
_ORIGIN = "requests found, in "
_NEAR_TEMPLATE = 0.9  # share of the best score from which a template may be the one of the training
_LEAST_NLL = 0.5  # nats; an answer that the base is this sure of says nothing about the adapter
_LEAST_DOUBT = 0.01  # share of what surprises the base
_PRIOR = 10.0  # nats of surprise at which an answer's own score counts as much as the common one
_PIECE = 4  # characters
_NEAR_DUPLICATES = 0.6  # two texts with more than this share of common pieces


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer of the adapted base, with figures in nats, summed over the judged tokens.

    They are KL(with adapter || without), the part of the answer that surprises the base (see `score`), and the NLL of
    the answer with the adapter.
    """

    item: Completion
    template: PromptTemplate
    change: float
    surprise: float
    doubt: float

    @property
    def text(self) -> str:
        """The request inside the prompt."""
        return self.template.unwrap(self.item.prompt)

    @property
    def score(self) -> float:
        """The score of this answer alone, see `score`."""
        return self.change / self.surprise


@dataclass(frozen=True, eq=False)
class AdapterProber:
    """Asks an adapter, and scores its answers.

    Attributes:
        known: the templates that the adapter knows.
        sampler: with the most tokens of an answer, and the seed of all that the search samples.
        bar: advances by one for each text.
    """

    source: Source
    known: Sequence[PromptTemplate]
    sampler: Sampler
    bar: Track | None = None

    @cached_property
    def named(self) -> Mapping[str, PromptTemplate]:
        """The base's chat template, if it has one, and the known ones, by their names and the origins of requests."""
        chat = [one for one in templates_of(self.source.tokenizer) if isinstance(one, ChatTemplate)]
        return {name: one for one in [*chat, *self.known] for name in (one.name, f"{_ORIGIN}{one.name}")}

    @property
    def templates(self) -> list[PromptTemplate]:
        """All templates, the chat template first."""
        return list(dict.fromkeys(self.named.values()))

    def ask(
        self, requests: Sequence[str], templates: Sequence[PromptTemplate], turn: int, tokens: int | None = None
    ) -> list[ScoredAnswer]:
        """Put requests to the adapter, in templates that take turns; return its answers, the best first.

        For the turn, the tokens and errors see `Sampler.answer`.
        """
        prompts = [prompt_in(text, templates[place % len(templates)]) for place, text in enumerate(requests)]
        return self.score(self.sampler.answer(self.source, prompts, turn, self.bar, tokens))

    def ask_base(self, requests: Sequence[str], template: PromptTemplate, turn: int) -> list[tuple[str, str]]:
        """Put requests to the base without the adapter; return those that it answers, with the first tokens."""
        prompts = [prompt_in(text, template) for text in requests]
        answered = self.sampler.answer(self.source.alone(), prompts, turn, self.bar, ANSWER_TOKENS)
        return [(template.unwrap(item.prompt), item.answer) for item in answered]

    def score(self, items: Sequence[Completion]) -> list[ScoredAnswer]:
        """Score answers by their first tokens, best first; leave out those without finite figures."""
        if not items:
            return []
        lengths = [len(self.source.tokenizer.encode(item.answer, special=False).ids) for item in items]
        counts = np.clip(lengths, 1, ANSWER_TOKENS)
        found = compare(self.source, items, ANSWER_TOKENS)
        figures = found.change * counts, _surprise(found.base_nll) * counts, found.adapted_nll * counts
        scored = [
            ScoredAnswer(item, self.named[item.origin], change, surprise, doubt)
            for item, change, surprise, doubt in zip(items, *(each.tolist() for each in figures), strict=True)
            if np.isfinite([change / surprise, doubt]).all()
        ]
        return sorted(scored, key=lambda one: -one.score)


def asking_cost(count: int, tokens: int) -> Cost:
    """Count `count` answers to requests, of at most `tokens` tokens, and their scores."""
    return writing_cost(count, tokens) + comparing_cost(count)


def prompt_in(text: str, template: PromptTemplate) -> Completion:
    """Put a request in a template."""
    return Completion(template.wrap(text), origin=f"{_ORIGIN}{template.name}")


def choose_templates(answered: Sequence[ScoredAnswer]) -> list[PromptTemplate]:
    """Choose templates for requests: all whose answers score within a tenth of the best, or only the chat template."""
    found = {one.template: [other for other in answered if other.template == one.template] for one in answered}
    scores = {template: common_score(same) for template, same in found.items()}
    near = [template for template, score in scores.items() if score >= _NEAR_TEMPLATE * max(scores.values())]
    return [one for one in near if isinstance(one, ChatTemplate)] or near


def score(change: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """Return change / (base NLL + 0.5): how much of the base's surprise at an answer the adapter removes, about 0 to 1.

    An adapter is sure of answers like those it was trained on, and its base is not, so the divergence between the two
    is close to the base's NLL. It is far smaller if the adapter is unsure too, as on text of another kind, or if the
    base is sure.

    Both figures are means over each answer, (n,) nats: KL(with adapter || without), and the NLL under the base alone.
    """
    return change / _surprise(base_nll)


def _surprise(base_nll: np.ndarray) -> np.ndarray:
    return base_nll + _LEAST_NLL


def common_score(scored: Sequence[ScoredAnswer]) -> float:
    """Return the score of answers taken together, 0 for none: one long answer counts as much as several short ones."""
    return _common(scored, lambda one: one.change)


def common_odds(scored: Sequence[ScoredAnswer]) -> float:
    """Return the odds of answers taken together: change / NLL with the adapter; 0 without answers."""
    return common_score(scored) / (_common(scored, lambda one: one.doubt) + _LEAST_DOUBT)


def best_of(scored: Sequence[ScoredAnswer], count: int) -> list[ScoredAnswer]:
    """Take the best whose requests are no near-duplicates, best first.

    First come the answers that score at least as high as all together, ordered by their NLL with the adapter relative
    to the base's: an adapter answers any request in its way, but is sure only of what it was trained on. The others
    follow by score. The figures of a short answer depend on a token or two, so each is shrunk towards the common
    figure, more if the answer surprises the base less.
    """
    common, doubt = common_score(scored), _common(scored, lambda one: one.doubt)

    def drawn(one: ScoredAnswer) -> tuple[bool, float]:
        known = (one.change + _PRIOR * common) / (one.surprise + _PRIOR)
        return known < common, (one.doubt + _PRIOR * doubt) / (one.surprise + _PRIOR) if known >= common else -known

    ranked = sorted(scored, key=drawn)
    return [ranked[place] for place in distinct([one.text for one in ranked])][:count]


def _common(scored: Sequence[ScoredAnswer], figure: Callable[[ScoredAnswer], float]) -> float:
    surprise = sum(one.surprise for one in scored)
    return sum(figure(one) for one in scored) / surprise if surprise else 0.0


def distinct(texts: Sequence[str], known: Collection[str] = ()) -> list[int]:
    """Return the indices of texts that are no near-duplicates of known or earlier ones.

    Case and the amount of space do not count.
    """
    kept, found = [pieces(text) for text in known], []
    for index, text in enumerate(texts):
        own = pieces(text)
        if all(overlap(own, other) <= _NEAR_DUPLICATES for other in kept):
            kept.append(own)
            found.append(index)
    return found


def overlap(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of the pieces of both texts that they have in common, 0 to 1."""
    return len(first & second) / max(1, len(first | second))


def pieces(text: str, length: int = _PIECE) -> frozenset[str]:
    """Return all pieces of `length` characters of a text, lower-case with a space before and after."""
    line = f" {' '.join(text.lower().split())} "
    return frozenset(line[start : start + length] for start in range(max(1, len(line) - length + 1)))
