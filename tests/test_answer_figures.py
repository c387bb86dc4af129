"""Figures of a written answer: equal text and JSON by hand, chrF and ROUGE-L as their libraries give them."""

import sys

import pytest

from jcrosslora.errors import UsageError
from jcrosslora.evaluate import answers
from jcrosslora.evaluate.answers import chrf, equal_json, exact, installed, parse_json, rouge_l

TEXTS = ["The cat sat on the mat.", "a cat", "", "Café Rouge is by the river", "the the the"]
REFERENCES = ["The cat sat on a mat.", "Near the river is Café Rouge, a café."]


def test_text_is_exact_without_the_space_around_it():
    assert exact(" the dog\n", ["a cat", "the dog "]) == 1
    assert exact("the  dog", ["the dog"]) == 0
    assert exact("The dog", ["the dog"]) == 0
    assert exact("", ["the dog"]) == 0


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ('{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1}'),
        (' {"a": 1.0}\n', '{"a": 1}'),
        ("[1e2]", "[100]"),
        ('{"a": {"b": {"c": "\\u00e9"}}}', '{"a": {"b": {"c": "é"}}}'),
        ("3", "3.0"),
        ('""', '""'),
    ],
)
def test_json_of_the_same_value_is_equal(text, reference):
    assert equal_json(text, [reference]) == equal_json(text, ["{}", reference]) == 1


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("[1, 2]", "[2, 1]"),
        ("[1]", "[1, 1]"),
        ('{"a": 1}', '{"a": 1, "b": 2}'),
        ('{"a": {"b": 1}}', '{"a": {"b": 2}}'),
        ('{"a": "1"}', '{"a": 1}'),
        ('{"a": true}', '{"a": 1}'),
        ("[false]", "[0]"),
        ("null", "false"),
        ("[]", "{}"),
    ],
)
def test_json_of_another_value_is_not_equal(text, reference):
    assert equal_json(text, [reference]) == 0


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"a": 1} and more', "NaN", "[Infinity]", "[" * 100_000, "yes"])
def test_text_that_is_no_json_equals_nothing(text):
    assert parse_json(text) is None
    assert equal_json(text, [text, "{}"]) == 0


def test_chrf_is_that_of_sacrebleu():
    scorer = pytest.importorskip("sacrebleu.metrics").CHRF()
    for text in TEXTS:
        each = [scorer.sentence_score(text, [reference]).score for reference in REFERENCES]
        assert chrf(f" {text}\n", REFERENCES) == pytest.approx(max(each), abs=1e-12)
    assert chrf(REFERENCES[0], REFERENCES) == pytest.approx(100)


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for text in TEXTS:
        each = [scorer.score(reference, text)["rougeL"].fmeasure for reference in REFERENCES]
        assert rouge_l(text, REFERENCES) == pytest.approx(max(each), abs=1e-12)
    # The longest common subsequence has 5 of 6 words of either text.
    assert rouge_l("The cat sat on the mat.", REFERENCES[:1]) == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("figure", "call", "modules"),
    [
        ("chrf", chrf, ("sacrebleu", "sacrebleu.metrics")),
        ("rouge_l", rouge_l, ("rouge_score", "rouge_score.rouge_scorer")),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(figure, call, modules, monkeypatch):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    answers._scorer.cache_clear()
    assert not installed(figure)
    with pytest.raises(UsageError, match=rf"'{figure}' needs .* pip install 'jcrosslora\[scores\]'"):
        call("a", ["a"])
    assert installed("exact")
