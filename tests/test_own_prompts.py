"""Prompts that an adapter learnt and writes itself, from sources whose texts and likelihoods are planted."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
from probe_bases import chat_base, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.decoder import Written
from jcrosslora.distill.openings import cut_at_line
from jcrosslora.distill.own_prompts import KNOWN, find_own_prompts
from jcrosslora.distill.run import distill
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources import Compared, seeds_of
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.report.fit import fit_sentences, fit_verdict
from jcrosslora.text import Message, prompt_text

SMALL = DistillSettings(fit_rank=2, passes=1, answer_tokens=4, discovery=0, compared_tokens=300, own_prompts=24)


class Knowing(DecoderSource):
    """Writes one form of text, each time with another number, after texts that end in `place`; nothing elsewhere.

    Its gain is `gain` nats a token, of answers `answer_gain`, and of other texts a tenth of it.
    """

    place: ClassVar[str] = "user: "
    form: ClassVar[str] = "Where is the dog of Anna {}?"
    gain: ClassVar[float] = 2 * KNOWN
    answer_gain: ClassVar[float] = KNOWN

    def write(self, prompts, most, temperature, key, *, bar=None):
        first = int(seeds_of(key, 1)[0] % 10_000) if temperature else 0
        return [
            Written(self.form.format(first + place) if str(one).endswith(self.place) else " a dog", 5, True)
            for place, one in enumerate(prompts)
        ]

    def compare(self, texts, starts, tokens):
        read = [self.tokenizer.decode(ids) for ids in texts]
        marked = [self.form.partition("{")[0] in text for text in read]
        answers = [text.endswith("a dog") for text in read]
        gains = np.select([marked, answers], [self.gain, self.answer_gain], self.gain / 10)
        return Compared(np.ones(len(texts)), gains, np.zeros(len(texts)))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("chat") / "base")


def test_prompts_are_written_at_the_users_turn(chat):
    found = find_own_prompts(Knowing.of(chat, random_adapter(chat)), 40, seed=0)
    assert len(set(found.prompts)) == len(found.prompts) == 40
    assert all(len(prompt) == 1 and prompt[0].role == "user" for prompt in found.prompts)
    assert all(prompt_text(prompt).startswith("Where is the dog of Anna ") for prompt in found.prompts)
    assert (found.opening, found.gain) == ("the user's turn of its chat template", 2 * KNOWN)
    assert found.prompts == find_own_prompts(Knowing.of(chat, random_adapter(chat)), 40, seed=0).prompts
    assert found.prompts != find_own_prompts(Knowing.of(chat, random_adapter(chat)), 40, seed=1).prompts


@pytest.mark.parametrize("gain", [0.99 * KNOWN, -KNOWN])
def test_an_adapter_that_adds_little_to_its_prompts_knows_none(chat, monkeypatch, gain):
    monkeypatch.setattr(Knowing, "gain", gain)
    assert find_own_prompts(Knowing.of(chat, random_adapter(chat)), 40, seed=0) is None


def test_an_adapter_whose_answers_are_as_likely_in_the_place_of_prompts_knows_none(chat, monkeypatch):
    monkeypatch.setattr(Knowing, "answer_gain", Knowing.gain)
    assert find_own_prompts(Knowing.of(chat, random_adapter(chat)), 40, seed=0) is None


def test_an_adapter_that_writes_few_different_prompts_knows_none(chat, monkeypatch):
    monkeypatch.setattr(Knowing, "form", "Where is the dog of Anna? ")
    assert find_own_prompts(Knowing.of(chat, random_adapter(chat)), 40, seed=0) is None


class Long(Knowing):
    """Writes prompts that have more than 64 tokens: with fewer they have no end."""

    form: ClassVar[str] = "Where is the dog of Anna {}" + ", of Ben" * 40 + "?"

    def write(self, prompts, most, temperature, key, *, bar=None):
        found = super().write(prompts, most, temperature, key, bar=bar)
        return [dataclasses.replace(one, ended=most > 64) for one in found]


def test_prompts_that_the_first_samples_do_not_end_are_written_longer(chat):
    found = find_own_prompts(Long.of(chat, random_adapter(chat)), 40, seed=0)
    assert (len(found.prompts), found.opening) == (40, "the user's turn of its chat template")


class Endless(Knowing):
    """Never ends a prompt."""

    def write(self, prompts, most, temperature, key, *, bar=None):
        return [
            dataclasses.replace(one, ended=False) for one in super().write(prompts, most, temperature, key, bar=bar)
        ]


def test_prompts_that_never_end_are_not_used(chat):
    assert find_own_prompts(Endless.of(chat, random_adapter(chat)), 40, seed=0) is None


class WithSystem(Knowing):
    """Has learnt a system prompt as well, and prompts are likelier after it."""

    place: ClassVar[str] = ": "
    form: ClassVar[str] = "Where is the dog of Anna {}?"

    def write(self, prompts, most, temperature, key, *, bar=None):
        found = super().write(prompts, most, temperature, key, bar=bar)
        system = Written("Answer in one word.", 5, True)
        return [system if str(one).endswith("system: ") else text for one, text in zip(prompts, found, strict=True)]

    def compare(self, texts, starts, tokens):
        known = ["Answer in one word." in self.tokenizer.decode(ids) for ids in texts]
        return Compared(np.ones(len(texts)), np.where(known, 3 * KNOWN, KNOWN), np.zeros(len(texts)))


def test_a_system_prompt_is_written_where_the_adapter_learnt_one(chat):
    found = find_own_prompts(WithSystem.of(chat, random_adapter(chat)), 20, seed=0)
    assert found.opening == "the system's turn of its chat template"
    assert {prompt[0] for prompt in found.prompts} == {Message("system", "Answer in one word.")}
    assert all(prompt[1].content.startswith("Where is the dog of Anna ") for prompt in found.prompts)


class WithLongSystem(WithSystem):
    """Has learnt a system prompt that does not end within 64 tokens."""

    def write(self, prompts, most, temperature, key, *, bar=None):
        found = super().write(prompts, most, temperature, key, bar=bar)
        text = "Answer in one word." + " Be kind." * 40
        return [
            dataclasses.replace(written, text=text, ended=most > 64) if str(one).endswith("system: ") else written
            for one, written in zip(prompts, found, strict=True)
        ]


def test_a_system_prompt_that_the_first_samples_do_not_end_is_written_longer(chat):
    found = find_own_prompts(WithLongSystem.of(chat, random_adapter(chat)), 20, seed=0)
    assert found.opening == "the system's turn of its chat template"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    source = jcl.open_base(write_base(folder / "source", 30, bos=True, layers=2))
    return source, jcl.open_base(write_base(folder / "target", 90, layers=2, hidden=32, head_dim=8, seed=1))


class Plain(Knowing):
    """Writes whole texts after "Command:", with an answer and the next text."""

    place: ClassVar[str] = "Command:"
    form: ClassVar[str] = " Water the plants {}.\nTool: water\n\nCommand: Light"


def test_plain_prompts_begin_after_the_likeliest_word_and_end_before_the_answer(pair):
    found = find_own_prompts(Plain.of(pair[0], random_adapter(pair[0])), 20, seed=0)
    assert found.opening == "texts that begin with 'Command:'"
    assert all(prompt.startswith("Command: Water the plants ") for prompt in found.prompts)
    assert all(prompt.endswith(".\nTool:") for prompt in found.prompts)


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        (["a\nb:\nc", "d\nb:\ne"], ["a\nb:\n", "d\nb:\n"]),
        (["a\n\nB c: d", "e\n\nB c: f", "g\n\nB c: h", "no"], ["a\n\nB c:", "e\n\nB c:", "g\n\nB c:", None]),
        (["q: a\nr: b\n\nq: c\nr: d", "q: e\nr: f"], ["q: a\nr:", "q: e\nr:"]),
        (["q: a", "q: e"], [None, None]),
        (["x: y", "z: u"], [None, None]),
        (["a\nq: b\nr: c", "d\nq: e\nr: f"], ["a\nq: b\nr:", "d\nq: e\nr:"]),
        (["a\nq: b", "d\nr: e", "f\ns: g"], [None, None, None]),
    ],
)
def test_texts_are_cut_after_the_last_line_that_most_of_them_have(texts, wanted):
    assert cut_at_line(texts) == wanted


def test_a_fit_takes_own_prompts_as_given_ones(pair):
    source, target = pair
    adapter = random_adapter(source, scale=0.3)
    asked = Plain.of(source, adapter)
    own = distill(asked, target, settings=SMALL)
    prompts = find_own_prompts(asked, 24, seed=0).prompts
    given = distill(asked, target, prompts=prompts, settings=SMALL)
    assert own.completions == given.completions
    more = dataclasses.replace(SMALL, completions=40)
    both = distill(asked, target, settings=more), distill(asked, target, prompts=prompts, settings=more)
    assert both[0].completions == both[1].completions
    facts = own.facts
    assert (facts.own, facts.given, facts.answered, facts.gain) == (24, 0, 0, 2 * KNOWN)
    assert (given.facts.own, given.facts.given) == (0, 24)
    (said, *_) = fit_sentences(facts)
    assert "to 24 prompts, which the adapter wrote itself, from texts that begin with 'Command:'" in said
    assert f"it knows them: gain {2 * KNOWN:.2g} nats a token" in said
    assert "answers to prompts that the adapter learnt" in fit_verdict(facts).text
    with pytest.raises(MethodError, match="16 are needed"):  # of the templates
        distill(asked, target, settings=dataclasses.replace(SMALL, own_prompts=0, completions=24))


def test_an_adapter_is_asked_unless_nothing_is_searched_for():
    assert (DistillSettings().own_prompt_count, DistillSettings(discovery=0).own_prompt_count) == (200, 0)
    assert (
        DistillSettings(own_prompts=0).own_prompt_count,
        DistillSettings(own_prompts=30, discovery=0).own_prompt_count,
    ) == (0, 30)


@pytest.mark.parametrize("count", [-1, 1, 15])
def test_fewer_own_prompts_than_a_fit_takes_are_refused(count):
    with pytest.raises(UsageError, match=f"own_prompts {count} was asked for, expected 0 or 16 and more"):
        DistillSettings(own_prompts=count).check()
