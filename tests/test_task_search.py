"""The search for what an adapter is for: near-duplicates, scores, and an adapter whose job is found."""

import dataclasses
import re
from typing import ClassVar

import numpy as np
import pytest
from probe_bases import chat_base, write_base

from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.decoder import StackedAdapter, Written
from jcrosslora.distill import TEMPLATES, templates_of
from jcrosslora.distill.completions import completions_cost, write_completions
from jcrosslora.distill.sources import Compared
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.task_search import KINDS, NOTHING, AdapterProber, find_task, search
from jcrosslora.distill.task_search.answers import (
    ScoredAnswer,
    best_of,
    choose_templates,
    common_odds,
    common_score,
    distinct,
    score,
)
from jcrosslora.distill.task_search.request_writer import choose_examples
from jcrosslora.distill.task_search.search import share_of
from jcrosslora.distill.task_search.topics import starts
from jcrosslora.distill.templates import ChatTemplate, Sampler
from jcrosslora.text import Completion, prompt_text
from jcrosslora.utils.progress import Track

EXAMPLES = KINDS[0].examples
SAID = '{"colour": "red"}'
WORDS = "key", "bag", "dog", "hat", "pen", "cup", "map"
DATA = next(kind for kind in KINDS if kind.records)
LINES = "Tell me about {}", "Turn into JSON: {}"


def test_near_duplicates_are_left_out():
    texts = ["Play a song by Queen", "play  a song by queen!", "What is the weather?", "Play a song by Abba", "", "?"]
    assert distinct(texts) == [0, 2, 3, 4, 5]
    assert distinct(texts, ["Play a song by Queen."]) == [2, 3, 4, 5]
    assert distinct([]) == []


def test_the_score_is_high_where_the_adapter_is_sure_and_its_base_is_not():
    sure, unsure, both_sure, unchanged = score(np.array([2.0, 0.6, 0.05, 0.0]), np.array([2.2, 2.6, 0.1, 2.0]))
    assert sure > 0.7 > unsure > both_sure > unchanged == 0


def test_the_best_requests_differ():
    texts = {"Play a song by Queen": 0.5, "Play a song by Queen!": 0.6, "What is the weather?": 0.1, "Who is it?": 0.4}
    found = [scored(text, value, doubt=1 - value) for text, value in texts.items()]
    assert [one.text for one in best_of(found, 2)] == ["Play a song by Queen!", "Who is it?"]


def scored(text, value, surprise=40.0, doubt=0.3):
    item = Completion(TEMPLATES[0].wrap(text))
    return ScoredAnswer(item, TEMPLATES[0], value * surprise, surprise, doubt * surprise)


def test_short_answers_are_judged_by_all_others_too():
    short = scored("Who wrote Hamlet?", 0.5, 2.0, doubt=0.0)
    long = scored("Tell me of the sea", 0.4, 60.0, doubt=0.1)
    others = [scored(f"Say {number} words on this and that", 0.1) for number in range(10)]
    assert short.score > long.score
    assert best_of([short, long, *others], 1) == [long]
    surer = scored("Write a song", 0.35, 60.0, doubt=0.05)
    assert best_of([short, long, surer, *others], 3) == [surer, long, short]
    unknown = [scored(f"Name {number} things that are of wood", 0.05, doubt=0.01) for number in range(3)]
    assert best_of([long, surer, *others, *unknown], 2) == [surer, long]
    assert common_score([short, long]) == pytest.approx(25 / 62)
    assert common_score([]) == common_odds([]) == 0
    assert common_odds([long]) == pytest.approx(0.4 / 0.11)


def test_the_better_known_kind_of_prompt_gets_the_larger_share():
    assert share_of(0.5, 0.5) == 0.5
    assert share_of(0.8, 0.2) > 0.99
    assert share_of(0.2, 0.8) < 0.01
    assert share_of(0.0, 0.0) == share_of(-0.1, 0.5) == 0.0


def test_a_text_begins_in_every_place_that_has_a_token(tmp_path):
    base = load_tokenizer(open_base(write_base(tmp_path / "base", 30, bos=True)))
    question, task = TEMPLATES[0], dataclasses.replace(TEMPLATES[1], before="")
    found = starts(base, [question, task], ["Who?", "What?", "Why?", "When?"], 10)
    assert found == [
        *("Question: Who?\nAnswer:", "Question: What?\nAnswer:", "Question: Why?\nAnswer:", "Question: "),
        *("When?\nA:", "\nA:", "\nA:", "", "", "Question: \nAnswer:"),
    ]
    assert "" not in starts(dataclasses.replace(base, bos=None), [question, task], [], 20)
    assert starts(dataclasses.replace(base, bos=None), [], [], 20) == []


def words(*seed):
    return " ".join("".join(word) for word in np.random.default_rng(seed).choice([*"abcdefghijklmnop"], (8, 5)))


class Actor(DecoderSource):
    """With the adapter it answers requests for JSON in JSON, and others at length; the base alone writes requests."""

    said: ClassVar[str] = SAID

    def write(self, prompts, *_, bar=None, **__):
        if bar is not None:
            bar.update(len(prompts))
        return [self.one(prompt_text(prompt), place) for place, prompt in enumerate(prompts)]

    def amplified(self, strength, plausible):
        return Loud(*(getattr(self, field.name) for field in dataclasses.fields(self)))

    def compare(self, texts, starts, tokens):
        answers = [self.tokenizer.decode(ids[start:].tolist()) for ids, start in zip(texts, starts, strict=True)]
        known = np.array([answer.strip().startswith(self.said[:9]) for answer in answers])
        return Compared(np.where(known, 2.0, 0.2), np.where(known, 2.2, 2.0), np.where(known, 0.2, 1.8))

    def one(self, text, place):
        if self.model.adapter is not None:
            long = Written(" is the first of all things? And more\nthan that", 9, True)
            return Written(self.said, 5, True) if "JSON" in text else long
        # About what the adapter says it guesses half of the time what was asked; else it goes on as the text begins.
        *_, last = text.split("\n\nTopic: ")
        asks = "colour" in last and place % 2 if "Topic:" in text else "JSON" in text
        return Written(f" {LINES[bool(asks)].format(words(place, len(text)))}\n", 5, False)


class Loud(Actor):
    """Says what the adapter was trained to say, every other time."""

    def write(self, prompts, *rest, bar=None, **options):
        found = super().write(prompts, *rest, bar=bar, **options)
        return [Written(self.said, 5, True) if place % 2 else one for place, one in enumerate(found)]


@pytest.fixture
def actor(tmp_path):
    found = Actor.of(chat_base(tmp_path / "base"))
    return dataclasses.replace(found, model=found.model.with_adapter(StackedAdapter({})), adapter_name="the adapter")


def test_the_job_of_an_adapter_is_found(actor, monkeypatch):
    bars = []

    def counted(self, count=1):
        self.done += count
        bars[:] = [self]

    monkeypatch.setattr(Track, "update", counted)
    found = write_completions(actor, actor.alone(), Sampler(60), 12)
    task = found.task
    assert task.said[0].answer.startswith(SAID)
    assert task.job == "text to JSON"
    assert task.guessed
    assert all("JSON" in one.text and one.item.answer == SAID for one in task.examples)
    assert task.share > 0.99
    assert task.explained == pytest.approx(task.share * common_score(task.further))
    assert 0.5 < task.explained < 0.9
    chat = templates_of(actor.tokenizer)[-1]
    assert any(one.item.prompt == chat.wrap(one.text) for one in (*task.guessed, *task.examples))
    right = sum(item.answer == SAID for item in found.items)
    assert right > len(found.items) / 2
    assert (found.facts.requests, found.facts.job, found.facts.given) == (right, "text to JSON", 0)
    again = found.more(7, {item.prompt for item in found.items}, actor)
    assert {item.answer for item in again} == {SAID}
    assert 0 < bars[0].done <= bars[0].total


def test_examples_are_requests_that_are_answered_as_they_were_meant():
    kind = next(one for one in KINDS if one.name == "text to JSON")
    about = {words(place): f"{word} it, time" for place, word in enumerate(WORDS)}
    answered = [scored(kind.request(text, place), 0.5) for place, text in enumerate([*about, words(9)])]
    said = [f'{{"call": "{word}It"}}' for word in (*WORDS[:6], "sing", "tell")]
    found = [
        dataclasses.replace(one, item=dataclasses.replace(one.item, answer=answer))
        for one, answer in zip(answered, said, strict=True)
    ]
    assert {kind.input_of(one.text) for one in choose_examples(kind, found, about)} == set([*about][:6])
    # Of five that are there is no telling.
    assert set(choose_examples(kind, found[1:], about)) == set(found[1:])


def test_requests_are_put_in_the_chat_template_if_the_adapter_knows_it_nearly_as_well_as_any():
    chat = ChatTemplate("", "")
    known = dict(zip([chat, *TEMPLATES[:3]], (0.75, 0.8, 0.78, 0.4), strict=True))
    answered = [dataclasses.replace(scored("Sing", value), template=one) for one, value in known.items()]
    assert choose_templates(answered) == [chat]
    # Answers are taken together: one alone is not why a template is known.
    answered.append(dataclasses.replace(scored("Dance", 0.6), template=chat))
    assert choose_templates(answered) == [*TEMPLATES[:2]]
    assert choose_templates([]) == []


def test_fewer_requests_than_prompts_of_the_source_stand_in_a_plain_template(actor, monkeypatch):
    monkeypatch.setattr(search, "choose_templates", lambda _: [TEMPLATES[0]])
    found = write_completions(actor, actor.alone(), Sampler(60), 12)
    assert found.task.share == 0.3
    searched = [item for item in found.items if item.origin.startswith("requests found")]
    assert len(searched) == pytest.approx(0.3 * len(found.items), abs=1)
    assert {item.prompt for item in searched} > {one.item.prompt for one in found.task.further[:6]}
    # A third round of twelve would be more than it can use.
    assert 12 < len(found.task.further) <= 24


def test_later_requests_are_about_what_is_answered_in_their_own_templates(actor, monkeypatch):
    given = []

    def kept(writer, known, *more):
        given.extend(known.answered)
        return {}

    monkeypatch.setattr(search, "write_inputs", kept)
    one, other = (dataclasses.replace(scored("Sing it", 0.5), template=template) for template in TEMPLATES[:2])
    found = dataclasses.replace(
        NOTHING, kinds=[(KINDS[0], 0.5)], guessed=[one, other], further=[one], examples=[one], templates=[TEMPLATES[0]]
    )
    assert found.write(actor.alone(), 2, 0) == []
    assert given == [one, one]


def test_requests_are_measured_against_prompts_in_their_own_templates(actor):
    chat, plain = templates_of(actor.tokenizer)[-1], TEMPLATES[0]
    answers = [(plain, SAID)] * 10 + [(chat, "no")] * 2
    pilot = [Completion(one.wrap(words(turn)), text, True, one.name) for turn, (one, text) in enumerate(answers)]

    def found(pilot):
        prober = AdapterProber(actor, [plain, chat], Sampler(tokens=20))
        return find_task(prober, actor.alone(), pilot, 12)

    assert found(pilot).templates == [chat]
    assert found(pilot).share > 0.99
    # Without such prompts against all of them, which the adapter knows as well.
    assert 0.2 < found(pilot[:10]).share < 0.8


def test_what_is_explained_goes_by_the_share_of_the_search_and_its_answers():
    found = dataclasses.replace(NOTHING, further=[scored("Sing", 0.6), scored("Dance", 0.2)], share=0.5)
    assert found.explained == pytest.approx(0.2)
    assert dataclasses.replace(found, further=[scored("Sing", 1.2)]).explained == 0.5
    assert dataclasses.replace(found, further=[scored("Sing", -0.1)]).explained == NOTHING.explained == 0


def test_an_adapter_that_speaks_of_nothing_is_asked_for_the_like_of_the_examples(actor, monkeypatch):
    monkeypatch.setattr(Actor, "said", "42")
    found = write_completions(actor, actor.alone(), Sampler(60), 12)
    assert found.task.job == "text to JSON"
    assert {one.item.answer for one in found.task.guessed} == {"42"}
    assert found.task.further
    assert found.task.share > 0.99


class Describer(Actor):
    """With the adapter it makes sentences of data; the base alone writes data."""

    said: ClassVar[str] = "A thing of wood."

    def one(self, text, place):
        if self.model.adapter is None:
            return Written(f" name: {words(place, len(text))}, kind: thing\n", 5, False)
        asked = any(instruction.strip() in text for instruction in DATA.instructions)
        return Written(self.said if asked else "Nothing to say of that", 3, True)


def test_data_are_written_in_several_notations(actor):
    describer = Describer(*(getattr(actor, field.name) for field in dataclasses.fields(actor)))
    found = write_completions(describer, describer.alone(), Sampler(60), 40).task
    assert found.job == "data to text"
    inputs = [DATA.input_of(one.text) for one in found.further]
    assert set(inputs) <= set(found.about)
    assert all(text.startswith("name: ") for text in inputs)
    assert len(found.about) > 40
    assert distinct(list(found.about)) == list(range(len(found.about)))
    (template,) = found.templates
    asked = [template.unwrap(one.prompt) for one in found.write(describer.alone(), 60, 3)]
    for start in ("name: ", "name = ", '{"name": ', "name(", "name | "):
        assert any(text.removeprefix(one).startswith(start) for text in asked for one in DATA.instructions)
        assert any(one.text.removeprefix(way).startswith(start) for one in found.further for way in DATA.instructions)


@pytest.mark.parametrize(("kind", "search"), [(Actor, 12), (Actor, 0), (Describer, 12)])
def test_the_texts_that_are_counted_come_up_to_a_total_that_is_known_from_the_beginning(
    actor, every_line, capsys, kind, search
):
    names = [field.name for field in dataclasses.fields(DecoderSource)]
    source = kind(*(getattr(actor, name) for name in names))
    write_completions(source, source.alone(), Sampler(60), search)
    shown = re.findall(r"([\d,]+) of ([\d,]+) texts", capsys.readouterr().err)
    done, totals = (np.array([int(one.replace(",", "")) for one in side]) for side in zip(*shown, strict=True))
    assert len(done) > 4
    assert set(totals) == {completions_cost(60, None, search, templates=len(templates_of(source.tokenizer))).texts}
    assert (np.diff(done) >= 0).all()
    assert 0.9 * totals[-1] < done[-1] <= totals[-1]


def test_without_a_search_prompts_are_those_of_templates(actor):
    found = write_completions(actor, actor.alone(), Sampler(60), 0)
    assert {item.origin for item in found.items} <= {one.name for one in templates_of(actor.tokenizer)}
    assert not found.task.said
