"""The search for what an adapter is for.

It is asked to do a few jobs of each kind that models are often trained for: it knows best the kind that it was trained
on. It also says what it was trained to say. A base writes requests about that, as jobs of this kind are asked for, and
those that are answered as they were meant show it how to write others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.fit.distill.discovery.job_kinds import KINDS, JobKind
from jcrosslora.fit.distill.discovery.kind_choice import ANSWERS, answers_of, choose_kind
from jcrosslora.fit.distill.discovery.near_duplicates import distinct
from jcrosslora.fit.distill.discovery.openings import harvest, starts
from jcrosslora.fit.distill.discovery.requests import ask_about, resemble
from jcrosslora.fit.distill.discovery.scores import Scored, best_of, common_odds, common_score, score_all
from jcrosslora.fit.distill.discovery.subjects import choose_subjects
from jcrosslora.fit.distill.discovery.topics import choose_topics, doubted_subjects, is_about, parts_of, topic_of
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.templates import ConversationTemplate, PromptTemplate, templates_of
from jcrosslora.fit.distill.writing import answer_prompts
from jcrosslora.sources.protocol import Source, Writer
from jcrosslora.text import Completion
from jcrosslora.utils.progress import Track

# Rounds of requests about what was answered before, at most. Of records there are as many as a fit can use.
_TURNS = 3
ROUNDS = 5 + 2 * _TURNS  # texts that are written for each one that is asked for, at most, beside further records
# Answers to requests of all kinds of jobs, beside these texts: two turns of `choose_kind`, one if a kind leads at once.
PROBES = 2 * ANSWERS * sum(len(kind.examples) for kind in KINDS)
_NEAR_TEMPLATE = 0.9  # of the best score, that of one which the adapter may have been trained in
_EXAMPLES = 12  # best requests, which are shown to the writer
_FEWEST_FITTING = 6  # requests answered as they were meant, for no others to be shown
JUDGED_TOKENS = 24  # of an answer
_SHARPNESS = 4  # power of the odds that shares go by
# Share of requests in other templates than the chat template: an adapter of such a one was mostly trained on questions
# without an instruction, which the source writes itself.
_MOST_PLAIN = 0.3


@dataclass(frozen=True, eq=False)
class Discovery:
    """What an adapter is for, as far as it was found out.

    Attributes:
        kinds: kinds of jobs with the scores of answers to their requests, see `choose_kind`.
        said: what the adapter says where its change is amplified, the best first; nothing if its jobs are of records.
        guessed: answers to requests about that, the best first.
        further: answers to requests about what was answered to these, the best first.
        examples: the best requests of all, which `write` shows to the writer.
        about: the topics of the requests, by their inputs.
        templates: those that `write` puts requests in.
        share: of all prompts of a fit, how many should be such requests, 0 to 1.
    """

    kinds: list[tuple[JobKind, float]]
    said: list[Completion]
    guessed: list[Scored]
    further: list[Scored]
    examples: list[Scored]
    about: dict[str, str]
    templates: list[PromptTemplate]
    share: float

    @property
    def job(self) -> str:
        """The name of the adapter's kind of jobs; of records with the subject that most are about."""
        kind, subjects = self.kinds[0][0], Counter(self.about.values()).most_common(1)
        return f"{kind.name}, of the subject {subjects[0][0]}" if kind.records and subjects else kind.name

    @property
    def explained(self) -> float:
        """The share of prompts that are the search's, times the score of the answers to these, 0 to 1: see `score`."""
        return self.share * min(1.0, max(0.0, common_score(self.further)))

    def write(self, writer: Writer, count: int, seed: int, bar: Track | None = None) -> list[Completion]:
        """Write prompts of the adapter's kind, see `_write_inputs`, in its templates: at most `count`."""
        if not (self.examples and count):
            return []
        kind = self.kinds[0][0]
        answered = [one for one in (*self.guessed, *self.further) if one.template in self.templates]
        texts = list(_write_inputs(writer, kind, self.examples, answered, self.about, count, seed, bar))
        places = np.random.default_rng(seed).integers(count, size=(2, len(texts))).tolist()
        return [
            _prompt(kind.request(text, asked), self.templates[place % len(self.templates)])
            for text, asked, place in zip(texts, *places, strict=True)
        ]


NOTHING = Discovery([], [], [], [], [], {}, [], 0.0)


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
        bar: advances by `ROUNDS` for each text of a step.

    Raises:
        AdapterError: with the adapter the base's predictions are not finite.
    """
    count = settings.discovery
    chat = [one for one in templates_of(source.tokenizer) if isinstance(one, ConversationTemplate)]
    templates = list(dict.fromkeys([*chat, *known]))
    named = {name: one for one in templates for name in (one.name, _origin(one))}
    if not templates:
        return NOTHING

    def ask(texts: Sequence[str], templates: Sequence[PromptTemplate], seed: int, tokens: int = tokens) -> list[Scored]:
        prompts = [_prompt(text, templates[place % len(templates)]) for place, text in enumerate(texts)]
        answered = answer_prompts(source, prompts, tokens, settings.answer_temperature, seed, bar)
        return score_all(source, answered, named, JUDGED_TOKENS)

    # All in one template, so that kinds differ by themselves alone.
    def probe(requests: Sequence[str], turn: int) -> list[Scored]:
        return ask(requests, templates[:1], seed + turn - 1, JUDGED_TOKENS)

    def probe_base(requests: Sequence[str], turn: int) -> list[tuple[str, str]]:
        prompts, base = [_prompt(text, templates[0]) for text in requests], source.alone()
        answered = answer_prompts(base, prompts, JUDGED_TOKENS, settings.answer_temperature, seed + turn - 1, bar)
        return [(templates[0].unwrap(item.prompt), item.answer) for item in answered]

    probed = probe([request for kind in KINDS for request in kind.requests] * ANSWERS, 1)
    if not probed:
        return NOTHING
    kinds = choose_kind(probed, probe, probe_base)
    kind = kinds[0][0]

    def ask_inputs(inputs: Sequence[str], templates: Sequence[PromptTemplate], seed: int) -> list[Scored]:
        return ask([kind.request(text, place) for place, text in enumerate(inputs)], templates, seed)

    requests = [named[item.origin].unwrap(item.prompt) for item in pilot]
    # Sentences that are made of data speak of what stands in these, so what the adapter says anyway is of no use.
    begun = [] if kind.records else starts(source.tokenizer, templates, requests, count)
    said = harvest(source, begun, seed, bar) if begun else []
    answered = answers_of(kind, probed)
    # The worse half of it is what the adapter says anyway.
    heard = [("", item.answer) for item in said[: -(-len(said) // 2)]]
    about = _write_inputs(writer, kind, [], answered, {}, count, seed, bar, heard)
    guessed = ask_inputs(list(about), templates, seed)
    examples = choose_examples(kind, [*guessed, *answered], about)
    templates = choose_templates(guessed) or templates
    answered += [one for one in guessed if one.template in templates]
    most = 1.0 if any(isinstance(one, ConversationTemplate) for one in templates) else _MOST_PLAIN
    further: list[Scored] = []
    # The more is known of subjects, the better are requests about them: all that a fit can use are written in turns.
    turns = _TURNS + settings.rounds[0] // count if kind.records else _TURNS
    for turn in range(1, turns + 1):
        if len(further) >= most * settings.rounds[0]:  # more than the fit can use
            break
        later = _write_inputs(writer, kind, examples, answered, about, count, seed + turn, bar)
        about |= later
        answers = ask_inputs(list(later), templates, seed + turn)
        further += answers
        answered += answers
        examples = choose_examples(kind, [*examples, *answers], about)
    further.sort(key=lambda one: -one.score)
    alike = [item for item in pilot if named[item.origin] in templates] or pilot
    share = share_of(common_odds(further), common_odds(score_all(source, alike, named, JUDGED_TOKENS)))
    return Discovery(kinds, said, guessed, further, examples, about, templates, min(share, most))


def _write_inputs(
    writer: Writer,
    kind: JobKind,
    examples: Sequence[Scored],
    answered: Sequence[Scored],
    about: Mapping[str, str],
    count: int,
    seed: int,
    bar: Track | None,
    heard: Sequence[tuple[str, str]] = (),
) -> dict[str, str]:
    """Write at most `count` inputs about what the adapter speaks of; like the examples, if it speaks of nothing.

    Inputs that are like others drift away from what the adapter was trained on, as it answers all that is asked. Its
    answers stay there: what they speak of lies nearer. Those to records speak of what these hold, so records are about
    subjects (see `choose_subjects`), and no near-duplicates of earlier ones.

    Args:
        writer: of the inputs.
        kind: whose inputs they are; its own examples are shown beside the others.
        examples: the best requests.
        answered: the topics are of the better half of these answers, and of those that were as they were meant.
        about: the topics of their requests, by the inputs, as far as these had any.
        count: the most inputs.
        seed: of the sampling.
        bar: advances by one for each.
        heard: further answers with such topics, each behind its input, "" if there is none.

    Returns:
        The topics by the inputs, "" without one.
    """
    if kind.records:
        asked = zip(_asked(kind, answered), answered, strict=True)
        subjects = choose_subjects([(about[text], one) for (text, _), one in asked if text in about], count, seed)
        best = [(text, about[text]) for text, _ in _asked(kind, examples) if text in about]
        found = ask_about(writer, subjects, [*kind.records, *best], seed, bar)
        texts = list(found)
        return {texts[place]: found[texts[place]] for place in distinct(texts, list(about))}
    fitting = _fitting(kind, answered, about)
    told = dict.fromkeys([*best_of(answered, -(-len(answered) // 2)), *fitting])
    parts = parts_of([*heard, *_asked(kind, list(told))])
    shown = [*kind.examples, *_asked(kind, examples)]
    known = [(text, topic_of(own)) for (text, _), own in zip(shown, parts_of(shown), strict=True) if own]
    chosen = choose_topics(parts, count, seed, doubted_subjects(_asked(kind, answered), about)) if known else []
    if chosen:
        return ask_about(writer, chosen, known, seed, bar)
    return dict.fromkeys(resemble(writer, [text for text, _ in shown], count, seed, bar), "")


def choose_examples(kind: JobKind, answered: Sequence[Scored], about: Mapping[str, str]) -> list[Scored]:
    """Take the best requests: those that were answered by what they are about, if there are several."""
    fitting = _fitting(kind, answered, about)
    return best_of(fitting if len(fitting) >= _FEWEST_FITTING else answered, _EXAMPLES)


def choose_templates(answered: Sequence[Scored]) -> list[PromptTemplate]:
    """Choose templates for requests: the chat template if the adapter knows it nearly as well as any, or all such."""
    found = {one.template: [other for other in answered if other.template == one.template] for one in answered}
    scores = {template: common_score(same) for template, same in found.items()}
    near = [template for template, score in scores.items() if score >= _NEAR_TEMPLATE * max(scores.values())]
    return [one for one in near if isinstance(one, ConversationTemplate)] or near


def _fitting(kind: JobKind, answered: Sequence[Scored], about: Mapping[str, str]) -> list[Scored]:
    """Keep requests that were answered by what they are about."""
    asked = zip(answered, _asked(kind, answered), strict=True)
    return [one for one, (text, answer) in asked if is_about(answer, about.get(text, ""))]


def _asked(kind: JobKind, answered: Sequence[Scored]) -> list[tuple[str, str]]:
    return [(kind.input_of(one.text), one.item.answer) for one in answered]


def share_of(found: float, written: float) -> float:
    """Return the share of prompts to take from a search, 0 to 1.

    Kinds of prompts whose answers the adapter knows equally well get half each, and one that it knows worse much less.

    Args:
        found: `common_odds` of requests that the search found, none of them chosen by them.
        written: those of prompts in templates.
    """
    powers = max(0.0, found) ** _SHARPNESS, max(0.0, written) ** _SHARPNESS
    return powers[0] / sum(powers) if powers[0] > 0 else 0.0


def _prompt(text: str, template: PromptTemplate) -> Completion:
    return Completion(template.wrap(text), origin=_origin(template))


def _origin(template: PromptTemplate) -> str:
    return f"requests found, in {template.name}"
