"""The request writer: which of two bases it is, and what it writes."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
import pytest
from probe_bases import chat_base, write_base
from tiny_bases import random_adapter

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import Written
from jcrosslora.distill.sources import Compared
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.task_search import KINDS, choose_writer
from jcrosslora.distill.task_search.request_writer import ask_about, resemble
from jcrosslora.distill.templates import compare
from jcrosslora.text import Completion

EXAMPLES = KINDS[0].examples
WORDS = "key", "bag", "dog", "hat", "pen", "cup", "map"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return chat_base(tmp_path_factory.mktemp("writers") / "base")


@pytest.fixture(scope="module")
def source(base):
    return DecoderSource.of(base, random_adapter(base, scale=0.3))


class Told(DecoderSource):
    """Has one NLL for all tokens, and keeps what it was asked."""

    def compare(self, texts, starts, tokens):
        self.asked.extend(self.tokenizer.decode(ids[start:].tolist()) for ids, start in zip(texts, starts, strict=True))
        return Compared(*np.full((3, len(texts)), self.nll))


def told(source, nll):
    found = Told(*(getattr(source, field.name) for field in dataclasses.fields(source)))
    object.__setattr__(found, "nll", nll)
    object.__setattr__(found, "asked", [])
    return found


def test_the_base_that_foresees_inputs_better_writes_them(source):
    worse, better = told(source, 2.0), told(source, 1.0)
    assert choose_writer(worse, better) is better
    found = choose_writer(better, worse)
    assert isinstance(found, DecoderSource)
    assert found.model.adapter is None
    assert found.model.params is better.model.params
    inputs = [text for kind in KINDS for text in kind.inputs]
    # This tokenizer makes more tokens of an input than are compared.
    assert all(any(whole.startswith(text.strip()) for whole in inputs) for text in better.asked)
    assert len(set(better.asked)) == 2 * len(KINDS)
    shared = {}
    assert choose_writer(worse, better, shared) is better
    count = len(better.asked)
    assert choose_writer(worse, better, shared) is better
    assert len(better.asked) == count


def test_a_base_alone_is_compared_with_itself(source):
    items = [Completion("Anna said", " that the dog sleeps"), Completion("Water", " boils")]
    found, wanted = compare(source.alone(), items, 4), compare(source, items, 4)
    np.testing.assert_array_equal(found.change, 0)
    np.testing.assert_allclose(found.base_nll, wanted.base_nll, rtol=1e-4)
    np.testing.assert_array_equal(found.adapted_nll, found.base_nll)
    assert (np.abs(wanted.adapted_nll - wanted.base_nll) > 1e-3).all()
    nothing = jax.tree.map(lambda x: 0 * x, source.model.adapter)
    zero = dataclasses.replace(source, model=source.model.with_adapter(nothing))
    np.testing.assert_allclose(compare(zero, items, 4).adapted_nll, wanted.base_nll, rtol=1e-4)


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
