"""Which of two bases writes the prompts of a fit."""

import dataclasses

import jax
import numpy as np
import pytest
from probe_bases import chat_base
from tiny_bases import random_adapter

from jcrosslora.distill.discovery.job_kinds import KINDS
from jcrosslora.distill.prompt_writer import choose_writer
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.distill.sources.protocol import Compared
from jcrosslora.distill.template_choice import compare
from jcrosslora.text import Completion


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
    assert found.adapter is None
    assert found.params is better.params
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
    zero = dataclasses.replace(source, adapter=jax.tree.map(lambda x: 0 * x, source.adapter))
    np.testing.assert_allclose(compare(zero, items, 4).adapted_nll, wanted.base_nll, rtol=1e-4)
