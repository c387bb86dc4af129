"""The search for what an adapter is for.

It is asked to do a few jobs of each kind that models are often trained for: it knows best the kind that it was trained
on. It also says what it was trained to say. A base writes requests about that, as jobs of this kind are asked for, and
those that are answered as they were meant show it how to write others. Records of data are made of facts instead, about
the subjects that the adapter knows best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np

from jcrosslora.distill.discovery.asking import (
    JUDGED_TOKENS,
    Asking,
    asking_cost,
    choose_templates,
    origin_of,
    prompt_in,
)
from jcrosslora.distill.discovery.facts import SUBJECTS
from jcrosslora.distill.discovery.job_kinds import KINDS, JobKind
from jcrosslora.distill.discovery.kind_choice import ANSWERS, answers_of, choose_kind
from jcrosslora.distill.discovery.openings import harvest, harvest_cost, starts
from jcrosslora.distill.discovery.records import make_records
from jcrosslora.distill.discovery.requests import requests_cost
from jcrosslora.distill.discovery.scores import Scored, best_of, common_odds, common_score, score_all
from jcrosslora.distill.discovery.subjects import KnownSubjects, find_subjects
from jcrosslora.distill.discovery.topic_inputs import EXAMPLES, choose_examples, write_inputs
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources.protocol import Source, Writer
from jcrosslora.distill.templates import ConversationTemplate, PromptTemplate, templates_of
from jcrosslora.distill.writing import answer_prompts
from jcrosslora.text import Completion
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import Track

_TURNS = 3  # rounds of requests about what was answered before, at most
_SHARPNESS = 4  # power of the odds that shares go by
_SUBJECT_ANSWERS = 2.5  # in each turn of `find_subjects`, for each text that is asked for
# Share of requests in other templates than the chat template: an adapter of such a one was mostly trained on questions
# without an instruction, which the source writes itself.
_MOST_PLAIN = 0.3


@dataclass(frozen=True, eq=False)
class Discovery:
    """What an adapter is for, as far as it was found out.

    Attributes:
        kinds: kinds of jobs with the scores of answers to their requests, see `choose_kind`.
        said: what the adapter says where its change is amplified, the best first; nothing if its jobs are of records.
        guessed: answers to requests about that, or to records about all subjects, the best first.
        further: answers to requests about what was answered to these, or to records about `subjects`, the best first.
        examples: the best requests of all, which `write` shows to the writer.
        about: the topics of the requests, by their inputs.
        templates: those that `write` puts requests in.
        share: of all prompts of a fit, how many should be such requests, 0 to 1.
        subjects: of records; None for other jobs.
    """

    kinds: list[tuple[JobKind, float]]
    said: list[Completion]
    guessed: list[Scored]
    further: list[Scored]
    examples: list[Scored]
    about: dict[str, str]
    templates: list[PromptTemplate]
    share: float
    subjects: KnownSubjects | None = None

    @property
    def job(self) -> str:
        """The name of the adapter's kind of jobs; of records with the subject that it knows best."""
        name = self.kinds[0][0].name
        return f"{name}, of the subject {self.subjects.names[0]}" if self.subjects else name

    @property
    def explained(self) -> float:
        """How well the adapter's task is known, 0 to 1.

        The share of prompts that are the search's, times the score of the answers to these, see `score`. That of
        records alone: what is said of them stands there, so that an adapter which is sure of it is hardly wrong.
        """
        return self.share * (1.0 if self.subjects else min(1.0, max(0.0, common_score(self.further))))

    def write(self, writer: Writer, count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        """Write prompts of the adapter's kind, see `write_inputs`, in its templates: at most `count`."""
        if not (self.examples and count):
            return []
        kind = self.kinds[0][0]
        if self.subjects:
            texts = list(make_records(self.subjects.choose(count, seed), seed, self.about))
        else:
            answered = [one for one in (*self.guessed, *self.further) if one.template in self.templates]
            texts = list(write_inputs(writer, kind, self.examples, answered, self.about, count, seed, bar))
        places = np.random.default_rng(seed).integers(count, size=(2, len(texts))).tolist()
        return [
            prompt_in(kind.request(text, asked), self.templates[place % len(self.templates)])
            for text, asked, place in zip(texts, *places, strict=True)
        ]


NOTHING = Discovery([], [], [], [], [], {}, [], 0.0)


def search_cost(settings: DistillSettings, tokens: int) -> Cost:
    """Count a search for requests about topics; one for subjects of records writes about as much.

    Args:
        settings: of the fit.
        tokens: the most tokens of an answer.
    """
    count = settings.discovery
    if not count:
        return Cost()
    found = _kinds_cost() + harvest_cost(count)
    turns = [requests_cost(count) + asking_cost(count, tokens) for _ in range(1 + _TURNS)]
    return sum(turns, found)


def _kinds_cost() -> Cost:
    """Count the choice of a kind: those that are near are asked again, together about as often as all of them."""
    asked = asking_cost(ANSWERS * sum(len(kind.examples) for kind in KINDS), JUDGED_TOKENS)
    return asked + asked


def discover(
    source: Source,
    writer: Writer,
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
        writer: writes requests.
        pilot: answers to prompts that it wrote in templates that it knows; the search is measured against those in the
            templates of its requests, if there are any.
        known: these templates; the base's chat template is tried as well.
        settings: of the fit.
        tokens: the most tokens of an answer.
        seed: of all that is sampled.
        bar: advances by one for each text, about as many as `search_cost` counts.

    Raises:
        AdapterError: with the adapter the base's predictions are not finite.
    """
    chat = [one for one in templates_of(source.tokenizer) if isinstance(one, ConversationTemplate)]
    templates = list(dict.fromkeys([*chat, *known]))
    named = {name: one for one in templates for name in (one.name, origin_of(one))}
    if not templates:
        return NOTHING
    asking = Asking(source, named, settings.answer_temperature, tokens, bar)

    # All in one template, so that kinds differ by themselves alone.
    def probe(requests: Sequence[str], turn: int) -> list[Scored]:
        return asking.requests(requests, templates[:1], seed + turn - 1, JUDGED_TOKENS)

    def probe_base(requests: Sequence[str], turn: int) -> list[tuple[str, str]]:
        prompts, base = [prompt_in(text, templates[0]) for text in requests], source.alone()
        answered = answer_prompts(base, prompts, JUDGED_TOKENS, settings.answer_temperature, seed + turn - 1, bar)
        return [(templates[0].unwrap(item.prompt), item.answer) for item in answered]

    behind = 0 if bar is None else bar.done + _kinds_cost().texts
    probed = probe([request for kind in KINDS for request in kind.requests] * ANSWERS, 1)
    if not probed:
        return NOTHING
    kinds = choose_kind(probed, probe, probe_base)
    if bar is not None:
        bar.skip_to(behind)
    kind = kinds[0][0]
    if kind.records:
        found = _search_records(asking, kind, answers_of(kind, probed), settings, seed)
    else:
        requests = [named[item.origin].unwrap(item.prompt) for item in pilot]
        found = _search_topics(asking, writer, kind, answers_of(kind, probed), requests, settings, seed)
    alike = [item for item in pilot if named[item.origin] in found.templates] or pilot
    share = share_of(common_odds(found.further), common_odds(score_all(source, alike, named, JUDGED_TOKENS)))
    return replace(found, kinds=kinds, share=min(share, _most(found.templates)))


def _search_topics(
    asking: Asking,
    writer: Writer,
    kind: JobKind,
    answered: list[Scored],
    requests: Sequence[str],
    settings: DistillSettings,
    seed: int,
) -> Discovery:
    """Search for requests about what the adapter speaks of.

    Args:
        asking: asks the adapter.
        writer: writes the requests.
        kind: of the requests.
        answered: requests of this kind that were answered.
        requests: others, whose beginnings the adapter is asked to answer where its change is amplified.
        settings: of the fit.
        seed: of all that is sampled.
    """
    source, templates, count = asking.source, asking.templates, settings.discovery
    said = harvest(source, starts(source.tokenizer, templates, requests, count), seed, asking.bar)
    # The worse half of it is what the adapter says anyway.
    heard = [("", item.answer) for item in said[: -(-len(said) // 2)]]
    about = write_inputs(writer, kind, [], answered, {}, count, seed, asking.bar, heard)
    guessed = asking.inputs(kind, about, templates, seed)
    examples = choose_examples(kind, [*guessed, *answered], about)
    templates = choose_templates(guessed) or templates
    answered = [*answered, *(one for one in guessed if one.template in templates)]
    further: list[Scored] = []
    for turn in range(1, _TURNS + 1):
        if len(further) >= _most(templates) * settings.rounds[0]:  # more than the fit can use
            break
        later = write_inputs(writer, kind, examples, answered, about, count, seed + turn, asking.bar)
        about |= later
        answers = asking.inputs(kind, later, templates, seed + turn)
        further += answers
        answered += answers
        examples = choose_examples(kind, [*examples, *answers], about)
    further.sort(key=lambda one: -one.score)
    return replace(
        NOTHING, said=said, guessed=guessed, further=further, examples=examples, about=about, templates=templates
    )


def _search_records(
    asking: Asking, kind: JobKind, answered: list[Scored], settings: DistillSettings, seed: int
) -> Discovery:
    """Search for the subjects of records that the adapter knows best; all that a fit can use are about these.

    Sentences that are made of data speak of what stands in them, so what the adapter says anyway is of no use.

    Args:
        asking: asks the adapter.
        kind: of the requests.
        answered: requests of this kind that were answered.
        settings: of the fit.
        seed: of all that is sampled.
    """
    about = make_records([*islice(cycle(SUBJECTS), settings.discovery)], seed)
    guessed = asking.inputs(kind, about, asking.templates, seed)
    templates = choose_templates(guessed) or asking.templates

    def ask(subjects: Sequence[str], turn: int) -> list[tuple[str, Scored]]:
        records = make_records(subjects, seed + turn)
        answers = asking.inputs(kind, records, templates, seed + turn, JUDGED_TOKENS)
        return [(records[kind.input_of(one.text)], one) for one in answers]

    subjects = find_subjects(ask, round(_SUBJECT_ANSWERS * settings.discovery))
    wanted = round(_most(templates) * settings.rounds[0])
    later = make_records(subjects.choose(wanted, seed), seed + 1, about)
    further = asking.inputs(kind, later, templates, seed + 1)
    examples = best_of([*answered, *guessed, *further], EXAMPLES)
    about |= later
    return replace(
        NOTHING,
        guessed=guessed,
        further=further,
        examples=examples,
        about=about,
        templates=templates,
        subjects=subjects,
    )


def _most(templates: Sequence[PromptTemplate]) -> float:
    """Return the largest share of requests in these templates."""
    return 1.0 if any(isinstance(one, ConversationTemplate) for one in templates) else _MOST_PLAIN


def share_of(found: float, written: float) -> float:
    """Return the share of prompts to take from a search, 0 to 1.

    Kinds of prompts whose answers the adapter knows equally well get half each, and one that it knows worse much less.

    Args:
        found: `common_odds` of requests that the search found, none of them chosen by them.
        written: those of prompts in templates.
    """
    powers = max(0.0, found) ** _SHARPNESS, max(0.0, written) ** _SHARPNESS
    return powers[0] / sum(powers) if powers[0] > 0 else 0.0
