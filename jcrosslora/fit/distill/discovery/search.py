"""The search for what an adapter is for: it speaks, the base guesses what was asked, and the best guesses are kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.fit.distill.discovery.openings import harvest, starts
from jcrosslora.fit.distill.discovery.requests import back_translate, resemble
from jcrosslora.fit.distill.discovery.scores import Scored, best_of, score_all
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.templates import ConversationTemplate, PromptTemplate, templates_of
from jcrosslora.fit.distill.writing import answer_prompts
from jcrosslora.sources.protocol import Source
from jcrosslora.text import Completion
from jcrosslora.utils.progress import Track

ROUNDS = 7  # texts that are written for each one that is asked for
_EXAMPLES = 8  # best requests, which further ones are to resemble
_JUDGED_TOKENS = 24  # of an answer
_SHARPNESS = 4  # power of scores that shares go by


@dataclass(frozen=True, eq=False)
class Discovery:
    """What an adapter is for, as far as it was found out.

    Attributes:
        said: what the adapter says where its change is amplified, the best first.
        guessed: answers to requests that were guessed from that, the best first.
        resembling: answers to requests that resemble the best guesses, the best first.
        examples: the best requests of both, which `write` shows to the base.
        share: of all prompts of a fit, how many should be such requests, 0 to 1.
    """

    said: list[Completion]
    guessed: list[Scored]
    resembling: list[Scored]
    examples: list[Scored]
    share: float

    def write(self, source: Source, count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        """Write prompts like the examples, in their templates: at most `count`, without near-duplicates."""
        if not (self.examples and count):
            return []
        texts = resemble(source.alone(), [one.text for one in self.examples], count, seed, bar)
        places = np.random.default_rng(seed).integers(len(self.examples), size=len(texts))
        return [_prompt(text, self.examples[place].template) for text, place in zip(texts, places, strict=True)]


NOTHING = Discovery([], [], [], [], 0.0)


def discover(
    source: Source,
    pilot: Sequence[Completion],
    known: Sequence[PromptTemplate],
    settings: DistillSettings,
    tokens: int,
    seed: int,
    bar: Track | None = None,
) -> Discovery:
    """Find out what an adapter is for.

    Args:
        source: the base, with the adapter.
        pilot: answers to prompts that it wrote in templates that it knows; the search is measured against them.
        known: these templates; the base's chat template is tried as well.
        settings: of the fit.
        tokens: the most tokens of an answer.
        seed: of all that is sampled.
        bar: advances by `ROUNDS` for each text of a step.

    Raises:
        AdapterError: with the adapter the base's predictions are not finite.
    """
    base, count = source.alone(), settings.discovery
    chat = [one for one in templates_of(source.tokenizer) if isinstance(one, ConversationTemplate)]
    templates = list(dict.fromkeys([*chat, *known]))
    named = {name: one for one in templates for name in (one.name, _origin(one))}

    def ask(texts: Sequence[str], templates: Sequence[PromptTemplate], seed: int) -> list[Scored]:
        prompts = [_prompt(text, templates[place % len(templates)]) for place, text in enumerate(texts)]
        answered = answer_prompts(source, prompts, tokens, settings.answer_temperature, seed, bar)
        return score_all(source, answered, named, _JUDGED_TOKENS)

    requests = [named[item.origin].unwrap(item.prompt) for item in pilot]
    begun = starts(source.tokenizer, templates, requests, count)
    said = harvest(source, begun, seed, bar) if begun else []
    if not said:
        return NOTHING
    # The worse half of it is what the adapter says anyway.
    best = [item.answer for item in said[: -(-len(said) // 2)]]
    guessed = ask(back_translate(base, best, count, seed, bar), templates, seed)
    examples = best_of(guessed, _EXAMPLES)
    if not examples:
        return dataclasses.replace(NOTHING, said=said)
    texts = resemble(base, [one.text for one in examples], count, seed + 1, bar)
    resembling = ask(texts, [one.template for one in examples], seed + 1)
    share = share_of(_mean(resembling), _mean(score_all(source, pilot, named, _JUDGED_TOKENS)))
    return Discovery(said, guessed, resembling, best_of([*examples, *resembling], _EXAMPLES), share)


def share_of(found: float, written: float) -> float:
    """Return the share of prompts to take from a search, 0 to 1.

    Kinds of prompts whose answers the adapter knows equally well get half each, and one that it knows worse much less.

    Args:
        found: the mean score of requests that the search found, none of them chosen by its score.
        written: that of prompts in templates.
    """
    powers = max(0.0, found) ** _SHARPNESS, max(0.0, written) ** _SHARPNESS
    return powers[0] / sum(powers) if powers[0] > 0 else 0.0


def _mean(scored: Sequence[Scored]) -> float:
    return float(np.mean([one.score for one in scored])) if scored else 0.0


def _prompt(text: str, template: PromptTemplate) -> Completion:
    return Completion(template.wrap(text), origin=_origin(template))


def _origin(template: PromptTemplate) -> str:
    return f"requests found, in {template.name}"
