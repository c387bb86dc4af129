"""Notations of records."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jcrosslora.distill.discovery.job_kinds import KINDS
from jcrosslora.distill.discovery.notations import NOTATIONS, PLAIN, write_in, write_plain

WORDS = st.text("abcdefgh ,.0123456789", min_size=1).filter(lambda text: ", " not in text and text.strip(", ") == text)
KEYS = st.text("abcdefgh -", min_size=1).filter(lambda text: text.strip(" -") == text)
RECORDS = st.lists(st.tuples(KEYS, WORDS), min_size=1).map(tuple)


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
