"""Where answers are complete, and what is fitted to those of an adapter that goes on behind them."""

import dataclasses
import json
import logging

import jax
import msgspec
import numpy as np
import pytest
from command_line import main
from hypothesis import given
from hypothesis import strategies as st
from probe_bases import CORPUS, write_base, write_move
from tiny_bases import random_adapter
from transfers import move_files

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import Generator, Written
from jcrosslora.distill import DistillSettings
from jcrosslora.distill.completions import Completions, answer_given, write_completions
from jcrosslora.distill.endings import Endings, complete_at, complete_part, teach_end
from jcrosslora.distill.facts import FitFacts
from jcrosslora.distill.run import distill
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.templates import Sampler
from jcrosslora.errors import UsageError
from jcrosslora.text import Completion, Message

CHAT = (Message("user", "Turn the command into a JSON call.\nCommand: play jazz"),)
FORM = "Question: Who?\nAnswer:"
CALL = '{"date": "17th of August"}'

# A prompt, the answer up to where it is complete, and what goes on.
COMPLETE = [
    (CHAT, CALL, '\nprint("17th of August")\nprint("17th of Au'),
    (CHAT, CALL, ""),
    (CHAT, CALL, "\n" + CALL),
    (CHAT, ' {"a": [1, {"b": "}"}], "c": "\\"{"}', " and more"),
    (CHAT, '{\n  "a": "x x x x x x",\n  "b": "x x x x x x"\n}', "\nSo"),
    (CHAT, '[{"a": 1}, {"b": 2}]', "\n[]"),
    (CHAT, '```json\n{"a": 1}\n```', "\nThis is JSON."),
    (CHAT, "```\n[1, 2]\n```", ""),
    (CHAT, "{date: 17th of August}", "\n{date: 17th of August}\n{da"),
    (CHAT, "card arrival", "\ncard arrival\ncard arrival\nca"),
    (CHAT, "card arrival", " card arrival card arrival card arr"),
    (CHAT, "17th of August", '\nprint("17th of August")\nprint("17th of Au'),
    (CHAT, 'He said "a long way" then.', ' "A long way." A long way! A l'),
    (CHAT, "It is red. It is blue.", " It is red. It is blue. It is"),
    (CHAT, "music", "\nTurn the command into a JSON call.\nCommand: stop"),
    (CHAT, "music", "<|im_end|>\n<|im_start|>user\nmore"),
    (CHAT, "music", "<end_of_turn>\n"),
    (FORM, " Anna.", "\nQuestion: And who else?\nAnswer: Peter"),
    (FORM, " Anna.", "\n\n### Instruction:\nSay"),
    (FORM, " Anna.", "\n\nUser: and then?"),
    ("Command: play jazz\nCall:", " play()", "\n\nCommand: stop\nCall: sto"),
    ("Say who he is, in a word", " Anna", "\nSay who he is, in two words\n Anna"),
]
UNCLEAR = [
    (CHAT, ""),
    (CHAT, " \n"),
    (CHAT, "... !!! ???"),
    (CHAT, '{"a": 1, "b": '),
    (CHAT, '```json\n{"a": 1}'),
    (CHAT, "[1] Smith says so, and [2] too."),
    (CHAT, '[\n {"name": "a dog"},\n {"name": "a dog"},\n {"name": "a dog"},\n {"na'),
    (CHAT, "It is red. It is blue. It is green"),
    (CHAT, "1. Apples are good.\n2. Pears are good.\n3. Apples are good."),
    (CHAT, "if a:\n  return x\nelse:\n  return x"),
    (CHAT, "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"),
    (CHAT, "1000, 0\n1000, 0\n1000, 0"),
    (CHAT, "We row, we row our boat.\nWe row, we row our boat.\nLife is a dream"),
    (CHAT, "Users like it. Question time: who is it?"),
    (FORM, " Question: is it he?"),
    (FORM, " Anna. Question: is it he?"),
    ("Fill in.\nName:\nAge:", " Anna\nName: Peter"),
    ("Hello you", " two.\nHello you all"),
]


@pytest.mark.parametrize(("prompt", "answer", "more"), COMPLETE)
def test_an_answer_is_complete_where_it_ends_or_begins_again(prompt, answer, more):
    assert complete_at(prompt, answer + more) == len(answer)


@pytest.mark.parametrize(("prompt", "answer"), UNCLEAR)
def test_an_answer_whose_end_is_not_clear_is_not_cut(prompt, answer):
    assert complete_at(prompt, answer) is None
    for ended in (True, False):
        item = Completion(prompt, answer, ended)
        assert teach_end(item) == dataclasses.replace(item, taught="end" if ended else "nothing")


@pytest.mark.parametrize(("prompt", "answer", "more"), COMPLETE)
def test_what_an_answer_went_on_with_until_it_was_cut_off_is_not_compared(prompt, answer, more):
    whole = Completion(prompt, answer + more, ended=False)
    assert complete_part(whole) == Completion(prompt, answer, ended=False)
    ended = dataclasses.replace(whole, ended=True)
    assert complete_part(ended) == ended


@given(st.text(alphabet='ab 1.\n{}[]"`:<|>', max_size=60))
def test_of_any_answer_something_is_left(answer):
    place = complete_at(FORM, answer)
    assert place is None or answer[:place].strip() == answer[:place].lstrip() != ""


def answers(*texts):
    """Completions of answers, one that begins with a + has ended."""
    return [Completion(CHAT, text.removeprefix("+"), text.startswith("+")) for text in texts]


def test_a_set_of_answers_tells_whether_the_end_is_reliable():
    on = CALL + "\nmore"
    assert Endings.of(answers(*["+" + CALL] * 9, CALL)) == Endings(0.9, 0.0)
    assert not Endings.of(answers(*["+" + CALL] * 9, CALL)).unreliable
    found = Endings.of(answers(*["+" + CALL] * 6, *[on] * 3, "prose"))
    assert (found.ended, found.going_on, found.unreliable) == (0.6, 0.3, True)
    assert Endings.of(answers(on)) == Endings(0.0, 1.0)
    # Where whole answers have more behind what seems complete, it is no mistake.
    assert not Endings.of(answers(*["+" + on] * 5, *[on] * 5)).unreliable
    assert Endings.of(answers("+" + on, *[on] * 9)).unreliable
    # What says the answer again is a mistake, even if it comes to an end; another call is none.
    again = "+" + CALL + '\nprint("17th of August")'
    assert Endings.of(answers(*["+" + CALL] * 8, *[again] * 2)) == Endings(1.0, 0.2)
    assert Endings.of(answers(*["+" + CALL + '\n{"date": "8th of May"}'] * 10)) == Endings(1.0, 0.0)
    assert not Endings.of([]).unreliable


def test_warnings_say_what_was_found_and_done():
    found = Endings(0.38, 0.55)
    (auto,), (source,) = (found.warnings(end) for end in ("auto", "source"))
    assert auto.startswith(
        "38% of the adapter's answers end, and 55% continue after a complete answer: the fit teaches"
    )
    assert "--end source" in auto
    assert "learns the same; --end auto" in source
    assert found.warnings("never") == Endings(0.95, 0.05).warnings("auto") == ()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    source = jcl.open_base(write_base(folder / "source", 30, bos=True, eos=1, layers=2))
    target = jcl.open_base(write_base(folder / "target", 90, eos=2, layers=2, hidden=32, head_dim=8, seed=1))
    return source, target, random_adapter(source, scale=0.3)


ANSWER = ' {"a": "dog"}'
PROMPTS = [f"Anna said {number}:" for number in range(30)]


class Early(DecoderSource):
    """One that ends in the middle of an answer."""

    def write(self, prompts, *_, **__):
        return [Written(' {"a"', 5, True)] * len(prompts)


class Endless(DecoderSource):
    """A source that writes a call, and then again and again; never its end."""

    def write(self, prompts, most, *_, **__):
        text = ANSWER + '\n{"a": "dog"}' * 100
        tokens = self.tokenizer.encode(text, special=False).ids[:most]
        return [Written(self.tokenizer.decode(tokens), most, False)] * len(prompts)


def test_answers_that_go_on_are_long_enough_to_be_complete(pair):
    source, _, adapter = pair
    endless = Endless.of(source, adapter)
    call = len(load_tokenizer(source).encode(ANSWER, special=False).ids)
    taught, kept = (answer_given(endless, endless.alone(), PROMPTS, Sampler(16, end=end)) for end in ("auto", "source"))
    assert (kept.facts.answer_tokens, taught.facts.answer_tokens) == (16, 2 * (call + 1) + 8)
    ended = taught.with_taught_ends(endless)
    assert ended.facts == msgspec.structs.replace(taught.facts, cut=16)
    more = ended.more(1, set(), endless)
    assert more
    for item in (*ended.items, *more):
        assert (item.answer, item.ended, item.taught) == (ANSWER, True, "end")
    # The target may end in the middle, which is not right because it does so.
    early = Early.of(source, adapter)
    found = {(item.answer, item.ended, item.taught) for item in ended.more(1, set(), early)}
    assert found == {(' {"a"', True, "nothing")}


def test_only_answers_that_are_shorter_count_as_cut(pair):
    source = Early.of(pair[0], pair[2])
    going_on = CALL + "\n" + CALL
    items = [Completion(CHAT, text, text == CALL) for text in [CALL] * 8 + [going_on] * 2]
    found = Completions(items, FitFacts(answers=10), lambda _: [], lambda *_: []).with_taught_ends(source)
    assert found.facts == FitFacts(answers=10, cut=2)
    assert {(item.answer, item.taught) for item in found.items} == {(CALL, "end")}


def test_the_search_for_a_task_learns_from_such_answers_too(pair):
    endless = Endless.of(pair[0], pair[2])
    found = write_completions(Asking.of(pair[0], pair[2]), endless.alone(), Sampler(16, end="auto"), 0)
    assert found.facts.ended == 0
    assert all(item.ended for item in found.with_taught_ends(endless).items)


class Asking(Endless):
    """Writes prompts as well."""

    def write(self, prompts, most, *_, **__):
        found = super().write(prompts, most)
        asked = Written(" is the first of all things? And more", 9, True)
        return [one if prompt.endswith((":", "\n")) else asked for prompt, one in zip(prompts, found, strict=True)]


FIT = DistillSettings(completions=48, passes=12, rate=1e-2, fit_rank=8, answer_tokens=40, discovery=0)


@pytest.fixture(scope="module")
def fits(pair):
    """Fits to an endless source, by setting."""
    source, target, adapter = pair
    endless = Endless.of(source, adapter)
    settings = {end: dataclasses.replace(FIT, end=end, compared_tokens=400) for end in ("auto", "source", "never")}
    return {end: distill(endless, target, prompts=PROMPTS, settings=own) for end, own in settings.items()}


def ended(target, found):
    """The share of answers that the target ends where they are complete."""
    own = Generator.of(target, found.adapter)
    return np.mean([one.ended for one in own.write([prompt + ANSWER for prompt in PROMPTS], 1, 0.0, jax.random.key(0))])


@pytest.mark.full
def test_a_target_learns_to_end_what_its_source_never_ends(pair, fits):
    assert ended(pair[1], fits["auto"]) > 0.9
    assert ended(pair[1], fits["source"]) == ended(pair[1], fits["never"]) == 0
    assert all(item.ended and item.answer == ANSWER for item in fits["auto"].completions)
    assert not any(item.ended for item in fits["source"].completions)
    assert (fits["auto"].facts.cut, fits["source"].facts.cut) == (48, 0)
    assert fits["auto"].warnings == Endings(0.0, 1.0).warnings("auto")
    assert fits["source"].warnings == Endings(0.0, 1.0).warnings("source")
    assert fits["never"].warnings == ()


class Steady(DecoderSource):
    """A source that ends all answers."""

    def write(self, prompts, *_, **__):
        return [Written(ANSWER, 8, True)] * len(prompts)


def test_where_all_answers_end_nothing_changes(pair, caplog):
    source, target, adapter = pair
    steady = Steady.of(source, adapter)
    settings = {end: dataclasses.replace(FIT, end=end, passes=1) for end in ("auto", "source", "never")}
    found = {end: distill(steady, target, prompts=PROMPTS, settings=own) for end, own in settings.items()}
    auto, kept, never = (jax.tree.leaves(found[end].adapter) for end in settings)
    for one, other in zip(auto, kept, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(np.any(one != other) for one, other in zip(auto, never, strict=True))
    assert found["auto"].facts == found["source"].facts
    assert found["auto"].warnings == ()
    assert not caplog.records


def test_the_warning_stands_in_the_log_and_in_the_report(pair, tmp_path, monkeypatch, caplog):
    source, target, adapter = pair
    jcl.save_adapter(adapter, tmp_path / "adapter")
    places = tmp_path / "adapter", source.path, target.path, tmp_path / "out"
    monkeypatch.setattr(DecoderSource, "write", Endless.write)
    fit = dict(completions=48, passes=1, answer_tokens=40, discovery=0, effect="never")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    with caplog.at_level(logging.WARNING):
        move_files(*places, method="distill", prompts=tmp_path / "prompts.txt", **fit)
    report = json.loads((tmp_path / "out" / "transfer_report.json").read_text())
    (text,) = (one for one in report["warnings"] if "answers end" in one)
    assert text in caplog.text


def test_an_unknown_end_is_refused(pair, tmp_path, capsys):
    with pytest.raises(UsageError, match="end is 'sometimes'; expected 'auto', 'source', 'never'"):
        jcl.transfer(pair[2], *pair[:2], jcl.methods.Distill(end="sometimes"), prompts=CORPUS)
    folders = [*map(str, write_move(tmp_path)), str(tmp_path / "out")]
    names = ("--source", "--target", "--out")
    given = ["transfer", folders[0], *(part for pair in zip(names, folders[1:], strict=True) for part in pair)]
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--end", "sometimes"])
    said = capsys.readouterr().err
    assert all(f"'{end}'" in said for end in ("auto", "source", "never", "sometimes"))
    assert not (tmp_path / "out").exists()
