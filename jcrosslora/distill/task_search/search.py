"""The task search: find out which task an adapter was trained on, without data, and write prompts of that task.

First the adapter answers a few requests of each common kind of task; the kind of its most confident answers is chosen.
Then a base writes requests of that kind about topics that occur in the adapter's answers. Requests whose answers are
about the requested topic become examples for the next round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jcrosslora.distill.sources import Writer
from jcrosslora.distill.task_search.answers import (
    ANSWER_TOKENS,
    AdapterProber,
    ScoredAnswer,
    asking_cost,
    choose_templates,
    common_odds,
    common_score,
    prompt_in,
)
from jcrosslora.distill.task_search.kinds import ANSWERS, KINDS, JobKind, choose_kind
from jcrosslora.distill.task_search.request_writer import SearchState, choose_examples, requests_cost, write_inputs
from jcrosslora.distill.task_search.topics import amplified_cost, sample_amplified, starts
from jcrosslora.distill.templates import ChatTemplate, PromptTemplate
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track

_TURNS = 3  # rounds of requests about what was answered before, at most
_SHARPNESS = 4  # shares are proportional to this power of the odds
# Largest share of requests in other templates than the chat template: such an adapter was mostly trained on questions
# without an instruction, which the source writes itself.
_MOST_PLAIN = 0.3


@dataclass(frozen=True, eq=False)
class DiscoveredTask:
    """The task of an adapter as the search found it; answers are sorted, the best first.

    Attributes:
        kinds: kinds of tasks with the scores of answers to their requests, see `choose_kind`.
        said: texts that the adapter wrote with its change amplified.
        guessed: answers to requests about topics of these texts.
        further: answers to requests about topics of `guessed`, round by round.
        examples: the best requests of all, which `write` shows to the writer.
        about: input -> topic of each request.
        templates: the templates of the requests that `write` makes.
        share: the share of a fit's prompts that should be such requests, 0 to 1.
    """

    kinds: list[tuple[JobKind, float]]
    said: list[Completion]
    guessed: list[ScoredAnswer]
    further: list[ScoredAnswer]
    examples: list[ScoredAnswer]
    about: dict[str, str]
    templates: list[PromptTemplate]
    share: float

    @property
    def job(self) -> str:
        """The name of the adapter's kind of jobs."""
        return self.kinds[0][0].name

    @property
    def explained(self) -> float:
        """How well the adapter's task is known, 0 to 1.

        It is the share of prompts that the search wrote, times the score of their answers, see `score`.
        """
        return self.share * min(1.0, max(0.0, common_score(self.further)))

    def write(self, writer: Writer, count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        """Write prompts of the adapter's kind, see `write_inputs`, in its templates: at most `count`."""
        if not (self.examples and count):
            return []
        kind = self.kinds[0][0]
        answered = [one for one in (*self.guessed, *self.further) if one.template in self.templates]
        texts = list(write_inputs(writer, SearchState(kind, answered, self.about, self.examples), count, seed, bar))
        turns = np.random.default_rng(seed).integers(count, size=(2, len(texts))).tolist()
        return [
            prompt_in(kind.request(text, turn), self.templates[place % len(self.templates)])
            for text, turn, place in zip(texts, *turns, strict=True)
        ]


NOTHING = DiscoveredTask([], [], [], [], [], {}, [], 0.0)


def search_cost(count: int, tokens: int) -> Cost:
    """Count a search with `count` texts in each step and answers of at most `tokens` tokens."""
    if not count:
        return Cost()
    turns = [requests_cost(count) + asking_cost(count, tokens) for _ in range(1 + _TURNS)]
    return sum(turns, _kinds_cost() + amplified_cost(count))


def _kinds_cost() -> Cost:
    """Count the choice of a kind; the repeated requests of close kinds are about as many as the first ones of all."""
    asked = asking_cost(ANSWERS * sum(len(kind.examples) for kind in KINDS), ANSWER_TOKENS)
    return asked + asked


def find_task(prober: AdapterProber, writer: Writer, pilot: Sequence[Completion], count: int) -> DiscoveredTask:
    """Find out what an adapter is for.

    Args:
        prober: asks the adapter; its bar advances by about as many texts as `search_cost` counts.
        pilot: answers to prompts that the source wrote in templates that the adapter knows; the search is measured
            against those in the templates of its requests, if there are any.
        count: texts of each step.

    Raises:
        AdapterError: with the adapter the base's predictions are not finite.
    """
    bar, templates = prober.bar, prober.templates
    if not templates:
        return NOTHING

    # All in one template, so that only the kinds differ.
    def probe(requests: Sequence[str], turn: int) -> list[ScoredAnswer]:
        return prober.ask(requests, templates[:1], turn - 1, ANSWER_TOKENS)

    def probe_base(requests: Sequence[str], turn: int) -> list[tuple[str, str]]:
        return prober.ask_base(requests, templates[0], turn - 1)

    behind = 0 if bar is None else bar.done + _kinds_cost().texts
    probed = probe([request for kind in KINDS for request in kind.requests] * ANSWERS, 1)
    if not probed:
        return NOTHING
    kinds = choose_kind(probed, probe, probe_base)
    if bar is not None:
        bar.skip_to(behind)
    kind = kinds[0][0]
    requests = [prober.named[item.origin].unwrap(item.prompt) for item in pilot]
    begun = starts(prober.source.tokenizer, templates, requests, count)
    found = _search_topics(prober, writer, kind, kind.answers_in(probed), begun, count)
    alike = [item for item in pilot if prober.named[item.origin] in found.templates] or pilot
    share = share_of(common_odds(found.further), common_odds(prober.score(alike)))
    return replace(found, kinds=kinds, share=min(share, _most(found.templates)))


def _search_topics(
    prober: AdapterProber,
    writer: Writer,
    kind: JobKind,
    answered: list[ScoredAnswer],
    begun: Sequence[str],
    count: int,
) -> DiscoveredTask:
    """Search for requests of a kind, about topics of the adapter's answers and of the text it writes by itself."""
    seed, bar, templates = prober.sampler.seed, prober.bar, prober.templates

    said = sample_amplified(prober.source, begun, seed, bar)
    # The worse half of it is what the adapter says anyway.
    heard = [("", item.answer) for item in said[: -(-len(said) // 2)]]
    about = write_inputs(writer, SearchState(kind, answered, {}, heard=heard), count, seed, bar)
    guessed = prober.ask(kind.ask_for(about), templates, 0)
    examples = choose_examples(kind, [*guessed, *answered], about)
    templates = choose_templates(guessed) or templates
    answered = [*answered, *(one for one in guessed if one.template in templates)]
    further: list[ScoredAnswer] = []
    for turn in range(1, _TURNS + 1):
        if len(further) >= _most(templates) * prober.sampler.count:  # more than the fit can use
            break
        later = write_inputs(writer, SearchState(kind, answered, about, examples), count, seed + turn, bar)
        about |= later
        answers = prober.ask(kind.ask_for(later), templates, turn)
        further += answers
        answered += answers
        examples = choose_examples(kind, [*examples, *answers], about)
    further.sort(key=lambda one: -one.score)
    return replace(
        NOTHING, said=said, guessed=guessed, further=further, examples=examples, about=about, templates=templates
    )


def _most(templates: Sequence[PromptTemplate]) -> float:
    """Return the largest share of requests in these templates."""
    return 1.0 if any(isinstance(one, ChatTemplate) for one in templates) else _MOST_PLAIN


def share_of(found: float, written: float) -> float:
    """Return the share of prompts to take from a search, 0 to 1, by the `common_odds` of what was found and written.

    If the adapter is equally sure of both kinds of prompts, they get half each; a kind that it is less sure of gets far
    less.
    """
    powers = max(0.0, found) ** _SHARPNESS, max(0.0, written) ** _SHARPNESS
    return powers[0] / sum(powers) if powers[0] > 0 else 0.0
