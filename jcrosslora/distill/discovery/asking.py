"""How the adapter is asked: requests in templates, and their answers with scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jcrosslora.decoder.prompt_batches import writing_cost
from jcrosslora.distill.discovery.job_kinds import JobKind
from jcrosslora.distill.discovery.scores import Scored, common_score, score_all
from jcrosslora.distill.sources.protocol import Source
from jcrosslora.distill.template_choice import comparing_cost
from jcrosslora.distill.templates import ConversationTemplate, PromptTemplate
from jcrosslora.distill.writing import answer_prompts
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track

JUDGED_TOKENS = 24  # of an answer
_NEAR_TEMPLATE = 0.9  # of the best score, that of one which the adapter may have been trained in


@dataclass(frozen=True, eq=False)
class Asking:
    """How the adapter is asked.

    Attributes:
        source: the base, with the adapter.
        named: templates by their names, and by the origins of requests in them.
        temperature: of the answers.
        tokens: the most of an answer.
        bar: advances by one for each.
    """

    source: Source
    named: Mapping[str, PromptTemplate]
    temperature: float
    tokens: int
    bar: Track | None

    @property
    def templates(self) -> list[PromptTemplate]:
        """All templates."""
        return list(dict.fromkeys(self.named.values()))

    def requests(
        self, texts: Sequence[str], templates: Sequence[PromptTemplate], seed: int, tokens: int | None = None
    ) -> list[Scored]:
        """Have requests answered, in the templates in turn, and score the answers."""
        prompts = [prompt_in(text, templates[place % len(templates)]) for place, text in enumerate(texts)]
        answered = answer_prompts(self.source, prompts, tokens or self.tokens, self.temperature, seed, self.bar)
        return score_all(self.source, answered, self.named, JUDGED_TOKENS)

    def inputs(
        self,
        kind: JobKind,
        inputs: Iterable[str],
        templates: Sequence[PromptTemplate],
        seed: int,
        tokens: int | None = None,
    ) -> list[Scored]:
        """Have inputs of a kind answered, behind its instructions in turn, likewise."""
        requests = [kind.request(text, place) for place, text in enumerate(inputs)]
        return self.requests(requests, templates, seed, tokens)


def asking_cost(count: int, tokens: int) -> Cost:
    """Count the answers to requests, of at most so many tokens, and their scores."""
    return writing_cost(count, tokens) + comparing_cost(count)


def choose_templates(answered: Sequence[Scored]) -> list[PromptTemplate]:
    """Choose templates for requests: the chat template if the adapter knows it nearly as well as any, or all such."""
    found = {one.template: [other for other in answered if other.template == one.template] for one in answered}
    scores = {template: common_score(same) for template, same in found.items()}
    near = [template for template, score in scores.items() if score >= _NEAR_TEMPLATE * max(scores.values())]
    return [one for one in near if isinstance(one, ConversationTemplate)] or near


def prompt_in(text: str, template: PromptTemplate) -> Completion:
    """Put a request in a template."""
    return Completion(template.wrap(text), origin=origin_of(template))


def origin_of(template: PromptTemplate) -> str:
    """Return the origin of requests in a template."""
    return f"requests found, in {template.name}"
