"""Answers with a score: how well they show what the adapter was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.distill.discovery.near_duplicates import distinct
from jcrosslora.distill.sources.protocol import Source
from jcrosslora.distill.template_choice import compare
from jcrosslora.distill.templates import PromptTemplate
from jcrosslora.text import Completion

_LEAST_NLL = 0.5  # nats; an answer of which the base is as sure as this says nothing of the adapter
_LEAST_DOUBT = 0.01  # share of what surprises the base
_PRIOR = 10.0  # nats of an answer that it takes to believe its own score as much as that of all answers together


@dataclass(frozen=True)
class Scored:
    """An answer of the adapted base.

    Attributes:
        item: with its prompt.
        template: of the prompt.
        change: KL(with adapter || without), the sum over the tokens that are looked at, in nats.
        surprise: what of the answer surprises the base, likewise: see `score`.
        doubt: NLL of the answer with the adapter, likewise.
        tokens: how many are looked at.
    """

    item: Completion
    template: PromptTemplate
    change: float
    surprise: float
    doubt: float
    tokens: int

    @property
    def text(self) -> str:
        """The request inside the prompt."""
        return self.template.unwrap(self.item.prompt)

    @property
    def score(self) -> float:
        """The score of this answer alone, see `score`."""
        return self.change / self.surprise


def score(change: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """Return the share of what surprises the base in an answer that the adapter explains, about 0 to 1.

    An adapter is sure of the answers that it was trained on, and its base is not: the divergence between the two then
    comes close to the base's NLL of the answer. It stays far below where the adapter is unsure as well, as it is when
    it goes on from text of another kind, and where the base itself is sure.

    Args:
        change: (n,), KL(with adapter || without), the mean over each answer, in nats.
        base_nll: (n,), NLL of the answers under the base alone, likewise.
    """
    return change / _surprise(base_nll)


def _surprise(base_nll: np.ndarray) -> np.ndarray:
    return base_nll + _LEAST_NLL


def score_all(
    source: Source, items: Sequence[Completion], templates: Mapping[str, PromptTemplate], tokens: int
) -> list[Scored]:
    """Score answers by their first tokens, best first; those without finite figures are left out.

    Args:
        source: the base, with the adapter.
        items: answers with their prompts.
        templates: of the prompts, by the origins of the items.
        tokens: the most tokens of an answer that are looked at.
    """
    if not items:
        return []
    lengths = [len(source.tokenizer.encode(item.answer, special=False).ids) for item in items]
    counts = np.clip(lengths, 1, tokens)
    found = compare(source, items, tokens)
    figures = found.change * counts, _surprise(found.base_nll) * counts, found.adapted_nll * counts
    scored = [
        Scored(item, templates[item.origin], change, surprise, doubt, count)
        for item, change, surprise, doubt, count in zip(
            items, *(each.tolist() for each in (*figures, counts)), strict=True
        )
        if np.isfinite([change / surprise, doubt]).all()
    ]
    return sorted(scored, key=lambda one: -one.score)


def common_score(scored: Sequence[Scored]) -> float:
    """Return the score of answers taken together, 0 for none: one long answer counts as much as several short ones."""
    return _common(scored, lambda one: one.change)


def common_odds(scored: Sequence[Scored]) -> float:
    """Return what the adapter explains over what it doubts, of answers taken together; 0 for none."""
    return common_score(scored) / (_common(scored, lambda one: one.doubt) + _LEAST_DOUBT)


def best_of(scored: Sequence[Scored], count: int) -> list[Scored]:
    """Take the best whose requests are no near-duplicates, best first.

    They are those that score as high as all together, or higher, and of them those whose answers the adapter doubts
    least for what surprises the base: it gives its kind of answer to whatever it is asked, but is sure only of what it
    was trained on. Behind them come the others by their scores. Figures of a short answer hang on a token or two, so
    each is drawn towards that of all together, the less an answer surprises the base the more.
    """
    common, doubt = common_score(scored), _common(scored, lambda one: one.doubt)

    def drawn(one: Scored) -> tuple[bool, float]:
        known = (one.change + _PRIOR * common) / (one.surprise + _PRIOR)
        return known < common, (one.doubt + _PRIOR * doubt) / (one.surprise + _PRIOR) if known >= common else -known

    ranked = sorted(scored, key=drawn)
    return [ranked[place] for place in distinct([one.text for one in ranked])][:count]


def _common(scored: Sequence[Scored], figure: Callable[[Scored], float]) -> float:
    surprise = sum(one.surprise for one in scored)
    return sum(figure(one) for one in scored) / surprise if surprise else 0.0
