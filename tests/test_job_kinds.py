"""Kinds of jobs: their requests and notations, and the choice of one by odds, looks and more answers."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jcrosslora.distill import TEMPLATES
from jcrosslora.distill.task_search.answers import ScoredAnswer, distinct
from jcrosslora.distill.task_search.kinds import (
    ANSWERS,
    KINDS,
    NOTATIONS,
    PLAIN,
    choose_kind,
    likeness,
    write_in,
    write_plain,
)
from jcrosslora.text import Completion

WORDS = st.text("abcdefgh ,.0123456789", min_size=1).filter(lambda text: ", " not in text and text.strip(", ") == text)
KEYS = st.text("abcdefgh -", min_size=1).filter(lambda text: text.strip(" -") == text)
RECORDS = st.lists(st.tuples(KEYS, WORDS), min_size=1).map(tuple)
KIND_OF = {request: kind for kind in KINDS for request in kind.requests}
REQUESTS = list(KIND_OF)


def scored(text, value, answer="It is so.", doubt=0.3, surprise=40.0):
    item = Completion(TEMPLATES[0].wrap(text), answer)
    return ScoredAnswer(item, TEMPLATES[0], value * surprise, surprise, doubt * surprise)


class Probes:
    """Answers of an adapter to requests, with scores by their kinds, and those of its base.

    Args:
        scores: by the names of kinds.
        answers: of the adapter, likewise, for all but "It is so."
        plain: of the base, likewise.
        noise: standard deviation of scores over the score.
        seed: of the noise.
    """

    def __init__(self, scores, answers=None, plain=None, noise=0.0, seed=0):
        self.scores, self.answers, self.plain = scores, answers or {}, plain or {}
        self.noise, self.rng, self.asked = noise, np.random.default_rng(seed), []

    def probe(self, requests, turn):
        self.asked.append((turn, "adapter", Counter(KIND_OF[request].name for request in requests)))
        names = [KIND_OF[request].name for request in requests]
        values = [self.scores.get(name, self.scores[""]) * self.rng.normal(1, self.noise) for name in names]
        return [
            scored(request, value, self.answers.get(name, "It is so."))
            for request, name, value in zip(requests, names, values, strict=True)
        ]

    def probe_base(self, requests, turn):
        self.asked.append((turn, "base", Counter(KIND_OF[request].name for request in requests)))
        return [(request, self.plain.get(KIND_OF[request].name, "It is so.")) for request in requests]

    def choose(self):
        return choose_kind(self.probe(REQUESTS * ANSWERS, 1), self.probe, self.probe_base)


def test_a_kind_that_is_known_best_by_far_is_taken_at_once():
    probes = Probes({"translation": 0.3, "code": 0.14, "": 0.1})
    found = probes.choose()
    assert [kind.name for kind, _ in found[:2]] == ["translation", "code"]
    assert [value for _, value in found[:3]] == pytest.approx([0.3, 0.14, 0.1])
    assert len(found) == len(KINDS)
    assert len(probes.asked) == 1


def test_kinds_are_known_by_what_the_adapter_is_sure_of():
    """Of two kinds of like scores that is taken whose answers it doubts less."""
    answered = [
        scored(request, 0.3 if name in {"code", "summaries"} else 0.05, doubt=0.2 if name == "code" else 0.7)
        for request, kind in KIND_OF.items()
        for name in [kind.name]
    ]
    found = choose_kind(answered, lambda *_: [], lambda *_: [])
    assert found[0][0].name == "code"


@pytest.mark.parametrize(("score", "first"), [(0.6, "labels of wishes"), (0.3, "arithmetic")])
def test_of_kinds_that_are_known_nearly_alike_that_of_the_answers_looks_is_taken(score, first):
    """An adapter that answers everything by a label knows all kinds; those that it knows far less are left out."""
    answers = dict.fromkeys([kind.name for kind in KINDS], "lost card")
    probes = Probes({"arithmetic": 0.7, "questions": 0.2, "": score}, answers)
    found = probes.choose()
    assert found[0][0].name == first
    assert max(found, key=lambda one: one[1])[0].name == "arithmetic"
    assert len(found) == len(KINDS)


def test_looks_that_are_the_bases_own_say_nothing_of_the_adapter():
    """Answers in conversation are sentences whoever gives them; only the adapter answers by labels."""
    sentence, label = "I'm well, thank you. What can I do for you?", "late delivery"
    scores = {"conversation": 0.3, "labels of wishes": 0.3, "": 0.05}
    answers = {"conversation": sentence, "labels of wishes": label}
    plain = {"conversation": sentence, "labels of wishes": "{}"}
    assert Probes(scores, answers, plain).choose()[0][0].name == "labels of wishes"
    plain = {"conversation": "{}", "labels of wishes": label}
    assert Probes(scores, answers, plain).choose()[0][0].name == "conversation"


def test_kinds_that_are_near_are_asked_again_until_one_leads():
    probes = Probes({"data to text": 0.3, "conversation": 0.29, "code": 0.16, "": 0.05})
    assert probes.choose()[0][0].name == "data to text"
    near = {"data to text", "conversation"}
    assert [(turn, who) for turn, who, _ in probes.asked] == [
        (turn, who) for turn in range(1, 7) for who in ("adapter", "base")
    ]
    # Of code the lead is known to be too small at once, and of the two neither leads far enough.
    assert set(probes.asked[1][2]) == {*near, "code"}
    assert all(set(asked) == near for _, _, asked in probes.asked[2:])
    assert all(asked["conversation"] == 6 * ANSWERS for _, who, asked in probes.asked if who == "adapter")
    # A lead that is too small for one turn is enough for several.
    probes = Probes({"data to text": 0.3, "conversation": 0.24, "": 0.05})
    assert probes.choose()[0][0].name == "data to text"
    assert max(turn for turn, _, _ in probes.asked) == 3


@pytest.mark.full
def test_more_answers_find_the_kind_more_often():
    """Noise like that of real answers, where data to text lead by a tenth."""
    scores = {"data to text": 0.165, "conversation": 0.15, "questions": 0.14, "": 0.11}
    right = [Probes(scores, noise=0.45, seed=seed).choose()[0][0].name == "data to text" for seed in range(100)]
    once = []
    for seed in range(100):
        answered = Probes(scores, noise=0.45, seed=seed).probe(REQUESTS * ANSWERS, 1)
        once.append(choose_kind(answered, lambda *_: [], lambda *_: [])[0][0].name == "data to text")
    assert sum(once) < 75 < 85 < sum(right)


def test_kinds_without_answers_are_left_out():
    only = [one for one in Probes({"": 0.3}).probe(REQUESTS, 1) if KIND_OF[one.text] is KINDS[0]]
    assert [kind.name for kind, _ in choose_kind(only, lambda *_: [], lambda *_: [])] == [KINDS[0].name]


def test_an_adapter_that_changes_nothing_gets_some_kind():
    found = Probes({"": 0.0}).choose()
    assert len(found) == len(KINDS)
    assert {value for _, value in found} == {0.0}


def test_looks_are_marks_and_where_letters_stand():
    assert likeness('{"call": "SendCard"}', '{"find": "Aunt May"}') > likeness('{"call": "SendCard"}', "send card")
    assert likeness("room 12", "flat 7") == 1


@given(RECORDS)
def test_every_notation_is_read_as_it_was_written(record):
    for notation in NOTATIONS:
        assert notation.read(notation.write(record)) == record
    texts = [write_in(PLAIN.write(record), place) for place in range(len(NOTATIONS))]
    assert len(set(texts)) == len(NOTATIONS)
    assert {write_plain(text) for text in texts} == {PLAIN.write(record)}


def test_notations_are_those_that_data_sets_have():
    text = "name: Mount Elva, height: 2,914 metres"
    assert json.loads(write_in(text, 2)) == {"name": "Mount Elva", "height": "2,914 metres"}
    assert write_in(text, 3) == "name(Mount Elva), height(2,914 metres)"
    assert write_in(text, 1) == "name = Mount Elva; height = 2,914 metres"


@pytest.mark.parametrize("text", ["Call my mother.", "", "name:", "one: two, three", "(a)", '{"a": 1}'])
def test_other_text_stays_as_it_is(text):
    assert [write_in(text, place) for place in range(9)] == [text] * 9
    assert write_plain(text) == text


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_requests_give_back_their_inputs(kind):
    count = len(NOTATIONS) * len(kind.instructions)
    for text in kind.inputs:
        requests = [kind.request(text, place) for place in range(count)]
        assert [kind.input_of(request) for request in requests] == [text] * count
        assert len(set(requests)) == (count if kind.records else len(kind.instructions))


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
