"""Answers with a score: how well they show what the adapter was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.fit.distill.discovery.near_duplicates import distinct
from jcrosslora.fit.distill.template_choice import compare
from jcrosslora.fit.distill.templates import PromptTemplate
from jcrosslora.sources.protocol import Source
from jcrosslora.text import Completion

_LEAST_NLL = 0.5  # nats; an answer of which the base is as sure as this says nothing of the adapter


@dataclass(frozen=True)
class Scored:
    """An answer of the adapted base.

    Attributes:
        item: with its prompt.
        template: of the prompt.
        score: see `score`.
    """

    item: Completion
    template: PromptTemplate
    score: float

    @property
    def text(self) -> str:
        """The request inside the prompt."""
        return self.template.unwrap(self.item.prompt)


def score(change: np.ndarray, base_nll: np.ndarray) -> np.ndarray:
    """Return the share of what surprises the base in an answer that the adapter explains, about 0 to 1.

    An adapter is sure of the answers that it was trained on, and its base is not: the divergence between the two then
    comes close to the base's NLL of the answer. It stays far below where the adapter is unsure as well, as it is when
    it goes on from text of another kind, and where the base itself is sure.

    Args:
        change: (n,), KL(with adapter || without), the mean over each answer, in nats.
        base_nll: (n,), NLL of the answers under the base alone, likewise.
    """
    return change / (base_nll + _LEAST_NLL)


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
    figures = score(*compare(source, items, tokens))
    scored = [
        Scored(item, templates[item.origin], float(figure))
        for item, figure in zip(items, figures, strict=True)
        if np.isfinite(figure)
    ]
    return sorted(scored, key=lambda one: -one.score)


def best_of(scored: Sequence[Scored], count: int) -> list[Scored]:
    """Take the best whose requests are no near-duplicates, best first."""
    ranked = sorted(scored, key=lambda one: -one.score)
    return [ranked[place] for place in distinct([one.text for one in ranked])][:count]
