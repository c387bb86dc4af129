"""The search for what an adapter is for: near-duplicates, scores, and an adapter whose job is found."""

import dataclasses
import re
from typing import ClassVar

import numpy as np
import pytest
from probe_bases import chat_base, write_base

from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.decoder import Written
from jcrosslora.distill import TEMPLATES, DistillSettings, template_choice, templates_of
from jcrosslora.distill.completions import completions_cost, write_completions
from jcrosslora.distill.discovery import openings, scores, search
from jcrosslora.distill.discovery.asking import choose_templates
from jcrosslora.distill.discovery.facts import SUBJECTS
from jcrosslora.distill.discovery.job_kinds import KINDS
from jcrosslora.distill.discovery.near_duplicates import distinct
from jcrosslora.distill.discovery.openings import starts
from jcrosslora.distill.discovery.requests import ask_about, resemble
from jcrosslora.distill.discovery.scores import Scored, best_of, common_odds, common_score, score
from jcrosslora.distill.discovery.search import NOTHING, discover, share_of
from jcrosslora.distill.discovery.subjects import KnownSubjects, find_subjects
from jcrosslora.distill.discovery.topic_inputs import choose_examples
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.sources.protocol import Compared
from jcrosslora.distill.templates import ConversationTemplate
from jcrosslora.text import Completion, prompt_text
from jcrosslora.utils.progress import Track

EXAMPLES = KINDS[0].examples
SAID = '{"colour": "red"}'
WORDS = "key", "bag", "dog", "hat", "pen", "cup", "map"
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
    return Scored(item, TEMPLATES[0], value * surprise, surprise, doubt * surprise, 20)


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

    def write(self, prompts, *_, bar=None, **__):
        if bar is not None:
            bar.update(len(prompts))
        return [self.one(prompt_text(prompt), place) for place, prompt in enumerate(prompts)]

    def one(self, text, place):
        if self.adapter is not None:
            long = Written(" is the first of all things? And more\nthan that", 9, True)
            return Written(SAID, 5, True) if "JSON" in text else long
        # About what the adapter says it guesses half of the time what was asked; else it goes on as the text begins.
        *_, last = text.split("\n\nTopic: ")
        asks = "colour" in last and place % 2 if "Topic:" in text else "JSON" in text
        return Written(f" {LINES[bool(asks)].format(words(place, len(text)))}\n", 5, False)


class Loud(Actor):
    """Says what the adapter was trained to say, every other time."""

    def write(self, prompts, *rest, bar=None, **options):
        found = super().write(prompts, *rest, bar=bar, **options)
        return [Written(SAID, 5, True) if place % 2 else one for place, one in enumerate(found)]


def compare(generator, completions, tokens):
    known = np.array([item.answer.startswith(SAID) for item in completions])
    return Compared(np.where(known, 2.0, 0.2), np.where(known, 2.2, 2.0), np.where(known, 0.2, 1.8))


@pytest.fixture
def actor(tmp_path, monkeypatch):
    for module in (template_choice, openings, scores):
        monkeypatch.setattr(module, "compare", compare)
    names = [field.name for field in dataclasses.fields(DecoderSource)]
    monkeypatch.setattr(openings, "amplify", lambda one, _: Loud(*(getattr(one, name) for name in names)))
    found = Actor.of(chat_base(tmp_path / "base"))
    return dataclasses.replace(found, adapter=object(), adapter_name="the adapter")


def test_the_job_of_an_adapter_is_found(actor, monkeypatch):
    bars = []

    def counted(self, count=1):
        self.done += count
        bars[:] = [self]

    monkeypatch.setattr(Track, "update", counted)
    found = write_completions(actor, actor.alone(), DistillSettings(completions=60, discovery=12), 0)
    discovery = found.discovery
    assert discovery.said[0].answer.startswith(SAID)
    assert discovery.job == "text to JSON"
    assert discovery.guessed
    assert all("JSON" in one.text and one.item.answer == SAID for one in discovery.examples)
    assert discovery.share > 0.99
    assert discovery.explained == pytest.approx(discovery.share * common_score(discovery.further))
    assert 0.5 < discovery.explained < 0.9
    chat = templates_of(actor.tokenizer)[-1]
    assert any(one.item.prompt == chat.wrap(one.text) for one in (*discovery.guessed, *discovery.examples))
    right = sum(item.answer == SAID for item in found.items)
    assert right > len(found.items) / 2
    assert f"{right} of them answers to requests found by a search (it knows best: text to JSON)" in found.description
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
    chat = ConversationTemplate("", "")
    known = dict(zip([chat, *TEMPLATES[:3]], (0.75, 0.8, 0.78, 0.4), strict=True))
    answered = [dataclasses.replace(scored("Sing", value), template=one) for one, value in known.items()]
    assert choose_templates(answered) == [chat]
    # Answers are taken together: one alone is not why a template is known.
    answered.append(dataclasses.replace(scored("Dance", 0.6), template=chat))
    assert choose_templates(answered) == [*TEMPLATES[:2]]
    assert choose_templates([]) == []


def test_fewer_requests_than_prompts_of_the_source_stand_in_a_plain_template(actor, monkeypatch):
    monkeypatch.setattr(search, "choose_templates", lambda _: [TEMPLATES[0]])
    found = write_completions(actor, actor.alone(), DistillSettings(completions=60, discovery=12), 0)
    assert found.discovery.share == 0.3
    searched = [item for item in found.items if item.origin.startswith("requests found")]
    assert len(searched) == pytest.approx(0.3 * len(found.items), abs=1)
    assert {item.prompt for item in searched} > {one.item.prompt for one in found.discovery.further[:6]}
    # A third round of twelve would be more than it can use.
    assert 12 < len(found.discovery.further) <= 24


def test_later_requests_are_about_what_is_answered_in_their_own_templates(actor, monkeypatch):
    given = []

    def kept(writer, kind, examples, answered, *more):
        given.extend(answered)
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
        return discover(actor, actor.alone(), pilot, [plain, chat], DistillSettings(discovery=12), 20, 0)

    assert found(pilot).templates == [chat]
    assert found(pilot).share > 0.99
    # Without such prompts against all of them, which the adapter knows as well.
    assert 0.2 < found(pilot[:10]).share < 0.8


def test_what_is_explained_goes_by_the_share_of_the_search_and_its_answers():
    found = dataclasses.replace(NOTHING, further=[scored("Sing", 0.6), scored("Dance", 0.2)], share=0.5)
    assert found.explained == pytest.approx(0.2)
    assert dataclasses.replace(found, further=[scored("Sing", 1.2)]).explained == 0.5
    assert dataclasses.replace(found, further=[scored("Sing", -0.1)]).explained == NOTHING.explained == 0
    # What is said of records stands there.
    assert dataclasses.replace(found, subjects=KnownSubjects(["hotel"], [1.0], [0.1])).explained == 0.5


def test_an_adapter_that_speaks_of_nothing_is_asked_for_the_like_of_the_examples(actor, monkeypatch):
    monkeypatch.setitem(globals(), "SAID", "42")
    found = write_completions(actor, actor.alone(), DistillSettings(completions=60, discovery=12), 0)
    assert found.discovery.job == "text to JSON"
    assert {one.item.answer for one in found.discovery.guessed} == {"42"}
    assert found.discovery.further
    assert found.discovery.share > 0.99


class Describer(Actor):
    """With the adapter it makes sentences of data, as any about what the data are about; alone it writes nothing."""

    def one(self, text, place):
        if self.adapter is None:
            return Written("It", 1, True)
        asked = any(text.endswith(kind) for kind in SUBJECTS) or "kind" in text or "job" in text
        return Written("A hotel." if "hotel" in text else "A thing." if asked else "Nothing to say of that", 3, True)


def test_records_are_about_what_the_adapter_knows_best(actor, monkeypatch):
    def compare(generator, completions, tokens):
        change = np.array([{"A hotel.": 2.0, "A thing.": 1.5}.get(item.answer, 0.1) for item in completions])
        return Compared(change, np.full(len(change), 2.2), np.full(len(change), 0.5))

    counts = []

    def find(ask, count):
        counts.append(count)
        return find_subjects(ask, count)

    for module in (template_choice, openings, scores):
        monkeypatch.setattr(module, "compare", compare)
    monkeypatch.setattr(search, "find_subjects", find)
    names = [field.name for field in dataclasses.fields(DecoderSource)]
    describer = Describer(*(getattr(actor, name) for name in names))
    found = write_completions(describer, describer.alone(), DistillSettings(completions=150, discovery=40), 0)
    discovery = found.discovery
    assert counts == [100]
    assert discovery.job == "data to text, of the subject hotel"
    assert "(it knows best: data to text, of the subject hotel)" in found.description
    # First of all subjects, then mostly of the one that is found.
    assert {discovery.about[discovery.kinds[0][0].input_of(one.text)] for one in discovery.guessed} == set(SUBJECTS)
    assert len([one for one in discovery.further if "hotel" in one.text]) > 0.9 * len(discovery.further)
    assert all("hotel" in one.text for one in discovery.examples)
    later = discovery.write(describer.alone(), 60, 3)
    assert len([item for item in later if "hotel" in prompt_text(item.prompt)]) > 0.9 * len(later) > 30
    (template,), kind = discovery.templates, discovery.kinds[0][0]
    for seed in range(3):
        inputs = [kind.input_of(template.unwrap(one.prompt)) for one in discovery.write(describer.alone(), 60, seed)]
        assert distinct(inputs, discovery.about) == list(range(len(inputs)))
    assert set(discovery.about.values()) <= set(SUBJECTS)
    assert distinct(list(discovery.about)) == list(range(len(discovery.about)))
    # All that are fitted to were made at once, but for near-duplicates.
    assert len(discovery.further) > 120


@pytest.mark.parametrize(("kind", "search"), [(Actor, 12), (Actor, 0), (Describer, 40)])
def test_the_texts_that_are_counted_come_up_to_a_total_that_is_known_from_the_beginning(
    actor, every_line, capsys, kind, search
):
    names = [field.name for field in dataclasses.fields(DecoderSource)]
    source = kind(*(getattr(actor, name) for name in names))
    settings = DistillSettings(completions=60, discovery=search)
    write_completions(source, source.alone(), settings, 0)
    shown = re.findall(r"([\d,]+) of ([\d,]+) texts", capsys.readouterr().err)
    done, totals = (np.array([int(one.replace(",", "")) for one in side]) for side in zip(*shown, strict=True))
    assert len(done) > 4
    assert set(totals) == {completions_cost(settings, templates=len(templates_of(source.tokenizer))).texts}
    assert (np.diff(done) >= 0).all()
    assert 0.9 * totals[-1] < done[-1] <= totals[-1]


def test_without_a_search_prompts_are_those_of_templates(actor):
    found = write_completions(actor, actor.alone(), DistillSettings(completions=60, discovery=0), 0)
    assert {item.origin for item in found.items} <= {one.name for one in templates_of(actor.tokenizer)}
    assert not found.discovery.said


class Lines(DecoderSource):
    asked: ClassVar[list[str]] = []
    lines: ClassVar[list[tuple[str, bool]]] = [
        (" Name the largest city.\nAnswer: x", False),
        (" Name the larg", False),
        (" Say it all again", True),
        (f" {EXAMPLES[0][0]}\n", False),
        ("no\n", False),
        (" Name the largest city!\n", False),
    ]

    def write(self, prompts, *_, **__):
        self.asked.extend(prompts)
        return [Written(text, 3, ended) for text, ended in self.lines]


def test_kinds_of_jobs_hold_different_inputs_on_one_line():
    inputs = [text for kind in KINDS for text in kind.inputs]
    assert distinct(inputs) == list(range(len(inputs)))
    assert not any("\n" in text for text in inputs)
    assert len({kind.name for kind in KINDS}) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_input_of_a_request_is_what_stands_behind_its_instruction(kind):
    requests = [kind.request("How is it?", place) for place in range(len(kind.instructions))]
    assert len(set(requests)) == len(kind.instructions)
    assert {kind.input_of(request) for request in requests} == {"How is it?"}


def test_requests_are_whole_lines_that_are_new(tmp_path):
    base = Lines.of(open_base(write_base(tmp_path / "base", 30)))
    topics = ["cities", "words", "towns", "seas", "rivers", "lakes"]
    known = [(text, "something else") for text in KINDS[0].inputs]
    assert ask_about(base, topics, known, 0) == {"Name the largest city.": "cities", "Say it all again": "towns"}
    assert base.asked[0].endswith("\n\nTopic: cities\nRequest:")
    assert base.asked[1].endswith("\n\nTopic: words\nRequest:")
    assert base.asked[0].count("\nRequest: ") == 6
    assert resemble(base, ["Name the largest city"], 6, 0) == ["Say it all again", EXAMPLES[0][0]]
    assert base.asked[-1] == "Request: Name the largest city\n\nRequest:"


def test_several_requests_are_written_behind_one_list(tmp_path, monkeypatch):
    base, asked = Lines.of(open_base(write_base(tmp_path / "base", 30))), []
    monkeypatch.setattr(Lines, "asked", asked)
    resemble(base, [f"Name {number} cities" for number in range(20)], 15, 0)
    assert [asked.count(prompt) for prompt in dict.fromkeys(asked)] == [6, 6, 3]
    asked.clear()
    ask_about(base, [f"topic {place}" for place in range(14)], [(f"Say {word}", word) for word in WORDS], 0)
    lists, last = zip(*(prompt.rsplit("\n\n", 1) for prompt in asked), strict=True)
    assert list(last) == [f"Topic: topic {place}\nRequest:" for place in range(14)]
    assert [lists.count(prompt) for prompt in dict.fromkeys(lists)] == [6, 6, 2]
