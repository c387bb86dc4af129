"""Subjects of records: all are asked about at first, and those that the adapter knows less are soon left out."""

from collections import Counter

import numpy as np
import pytest

from jcrosslora.distill import TEMPLATES
from jcrosslora.distill.discovery.facts import SUBJECTS
from jcrosslora.distill.discovery.scores import Scored
from jcrosslora.distill.discovery.subjects import KnownSubjects, find_subjects
from jcrosslora.text import Completion

KNOWN = {"hotel": 1.3, "song": 1.2, "car": 1.15}


def answer(change, tokens=20):
    return Scored(Completion("Say it"), TEMPLATES[0], change * tokens, 50.0, 30.0, tokens)


class Adapter:
    """Changes answers about some subjects more than those about the others, with some noise."""

    def __init__(self, noise, seed=0):
        self.noise, self.asked, self.rng = noise, [], np.random.default_rng(seed)

    def __call__(self, subjects, turn):
        assert turn == len(self.asked)
        self.asked.append(Counter(subjects))
        return [(name, answer(KNOWN.get(name, 1) * (1 + self.noise * self.rng.normal()))) for name in subjects]


def test_the_worse_half_is_left_out_after_each_turn():
    adapter = Adapter(0.0)
    found = find_subjects(adapter, 120)
    assert [len(turn) for turn in adapter.asked] == [30, 15, 7, 4]
    for turn in adapter.asked:
        assert len(set(turn.values())) == 1
        assert 120 <= turn.total() < 130
    assert found.names[:3] == list(KNOWN)
    assert len(found.names) == 4
    assert found.means == pytest.approx([1.3, 1.2, 1.15, 1.0])
    # Of all answers about the best, of which there are 4, 8, 18 and 30.
    assert found.errors == pytest.approx([0.3 * np.mean(found.means) / 60**0.5] * 4)


def test_a_shorter_search_asks_for_fewer_answers_about_each_subject():
    adapter = Adapter(0.0)
    assert find_subjects(adapter, 20).names[:3] == list(KNOWN)
    assert [set(turn.values()) for turn in adapter.asked] == [{1}, {2}, {3}, {5}]


def test_what_was_said_in_earlier_turns_still_counts():
    def ask(subjects, turn):
        known = {"hotel": 3.0} if turn == 0 else {"song": 1.5}
        return [(name, answer(known.get(name, 1.0))) for name in subjects]

    # 4 answers with a change of 3 and 56 of 1 are less than 4 of 1 and 56 of 1.5.
    found = dict(zip((known := find_subjects(ask, 120)).names, known.means, strict=True))
    assert found["hotel"] == pytest.approx((4 * 3 + 56) / 60)
    assert found["song"] == pytest.approx((4 + 56 * 1.5) / 60)
    assert known.names[:2] == ["song", "hotel"]


def test_the_subject_is_found_in_spite_of_the_noise_that_was_measured():
    found = [find_subjects(Adapter(0.3, seed), 120).names[0] for seed in range(20)]
    assert found.count("hotel") >= 14


def test_a_long_answer_counts_for_more_than_a_short_one():
    def ask(subjects, turn):
        short = {"song": 3.0}
        return [
            (name, one)
            for name in subjects
            for one in (answer(short.get(name, 1.0), 2), answer(1.2 if name == "hotel" else 1.0, 24))
        ]

    assert find_subjects(ask, 120).names[:2] == ["hotel", "song"]


def test_records_are_mostly_about_the_subject_that_is_surely_the_best():
    sure, unsure = (KnownSubjects(["hotel", "song"], [1.2, 1.0], [error] * 2) for error in (0.02, 0.2))
    assert set(sure.choose(300, 0)) == {"hotel"}
    assert 150 < unsure.choose(300, 0).count("hotel") < 270
    assert unsure.choose(300, 0) != unsure.choose(300, 1)
    assert sure.choose(0, 0) == []


def test_answers_that_are_left_out_tell_nothing():
    found = find_subjects(lambda subjects, _: [(name, answer(1.0)) for name in subjects if name == "team"], 120)
    assert found.names[0] == "team"
    assert set(found.names) <= set(SUBJECTS)
    assert len(found.choose(9, 0)) == 9
    assert find_subjects(lambda *_: [], 120).means == [0.0] * 4
