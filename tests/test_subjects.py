"""Subjects of records: all are asked about at first, and then those whose answers the adapter is surest of."""

from collections import Counter

import numpy as np
import pytest

from jcrosslora.fit.distill.discovery.scores import Scored
from jcrosslora.fit.distill.discovery.subjects import SUBJECTS, choose_subjects
from jcrosslora.fit.distill.templates import TEMPLATES
from jcrosslora.text import Completion


def answer(score, surprise=50.0):
    return Scored(Completion("Say it"), TEMPLATES[0], score * surprise, surprise, surprise)


def answers(sizes, seed=0):
    """Answers about every subject: those about hotels score 0.2 on average, all others 0.15, and all differ by 0.05."""
    rng = np.random.default_rng(seed)
    means = {subject: 0.2 if subject == "hotel" else 0.15 for subject in SUBJECTS}
    return [(subject, answer(rng.normal(mean, 0.05))) for subject, mean in means.items() for _ in range(sizes)]


def test_all_subjects_are_asked_about_at_first():
    assert len(set(SUBJECTS)) == len(SUBJECTS)
    assert Counter(choose_subjects([], 2 * len(SUBJECTS) + 3, 0)).most_common()[-1][1] == 2
    assert choose_subjects([], 5, 0) != choose_subjects([], 5, 1)
    assert choose_subjects(answers(1), 0, 0) == []


def test_the_subject_that_the_adapter_knows_best_is_asked_about_more_and_more():
    few, some, many = (Counter(choose_subjects(answers(size), 2000, 0))["hotel"] / 2000 for size in (1, 4, 60))
    assert few < some < many
    assert 1 / len(SUBJECTS) < some < 0.8 < many
    # One lucky answer says little.
    lucky = [*answers(8), ("song", answer(0.25)), ("a subject of its own", answer(0.25))]
    found = Counter(choose_subjects(lucky, 2000, 0))
    assert found["hotel"] > 3 * found["song"]
    assert found["a subject of its own"] > found["song"]


def test_a_long_answer_counts_for_more_than_a_short_one():
    others = [(subject, answer(0.15 + 0.01 * (place % 3))) for place, subject in enumerate(SUBJECTS[2:])] * 9
    one = [(SUBJECTS[0], answer(0.3, 100.0)), (SUBJECTS[0], answer(0.1, 10.0))] * 9
    other = [(SUBJECTS[1], answer(0.3, 10.0)), (SUBJECTS[1], answer(0.1, 100.0))] * 9
    found = Counter(choose_subjects([*others, *one, *other], 500, 0))
    assert found[SUBJECTS[0]] > 490
    assert not found[SUBJECTS[1]]


@pytest.mark.parametrize("scores", [[0.0, 0.0], [0.2, 0.2]])
def test_answers_that_score_alike_leave_all_open(scores):
    found = choose_subjects([(name, answer(score)) for name, score in zip(SUBJECTS, scores, strict=False)], 9, 0)
    assert len(found) == 9
    assert set(found) <= set(SUBJECTS)
