"""Records of facts, as requests have them."""

import pytest

from jcrosslora.distill.discovery.facts import FACTS, SUBJECTS
from jcrosslora.distill.discovery.job_kinds import KINDS
from jcrosslora.distill.discovery.near_duplicates import distinct
from jcrosslora.distill.discovery.notations import NOTATIONS, PLAIN
from jcrosslora.distill.discovery.records import make_records

(KIND,) = (kind for kind in KINDS if kind.records)


def test_every_key_has_values_and_a_subject():
    assert {key for keys in SUBJECTS.values() for key in keys} == set(FACTS)
    assert min(len(set(values)) for values in FACTS.values()) >= 2
    assert all(len(set(keys)) == len(keys) >= 5 for keys in SUBJECTS.values())


@pytest.mark.parametrize("subject", SUBJECTS)
def test_records_tell_of_a_subject_what_is_told_of_it(subject):
    found = make_records([subject] * 40, 0)
    assert set(found.values()) == {subject}
    assert len(found) > 20
    told = [PLAIN.read(text) for text in found]
    for record in told:
        (name, _), about, *facts = record
        assert (name, about) == ("name", ("kind", subject))
        assert len({key for key, _ in facts}) == len(facts) >= 2
        assert all(value in FACTS[key] for key, value in facts)
    assert {key for record in told for key, _ in record[2:]} == set(SUBJECTS[subject])
    assert {len(record) for record in told} >= {4, len(SUBJECTS[subject]) + 2}
    assert len({record[0][1] for record in told}) > 15
    # Any of the facts is told first.
    assert {record[2][0] for record in told} == set(SUBJECTS[subject])


def test_records_are_no_near_duplicates_and_hang_on_the_seed():
    subjects = ["match", "film"] * 60
    first = make_records(subjects, 0)
    assert make_records(subjects, 0) == first
    assert make_records(subjects, 1) != first
    assert distinct([*first]) == list(range(len(first)))
    assert not make_records(subjects, 0, first)
    later = make_records(subjects, 1, first)
    assert later
    assert distinct([*later], [*first]) == list(range(len(later)))
    assert make_records([], 0) == {}


def test_requests_give_back_records():
    count = len(NOTATIONS) * len(KIND.instructions)
    for text in make_records([*SUBJECTS] * 3, 0):
        requests = [KIND.request(text, place) for place in range(count)]
        assert [KIND.input_of(request) for request in requests] == [text] * count
        assert len(set(requests)) == count
