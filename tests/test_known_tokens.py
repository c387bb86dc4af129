"""What is right whatever the teacher says: the target is taught it, in tokens of its own."""

import dataclasses

import numpy as np
import pytest
from probe_bases import CORPUS, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.distill.batches import make_batches
from jcrosslora.distill.distillation import end_tokens
from jcrosslora.distill.output_columns import find_columns
from jcrosslora.distill.sources.decoder import DecoderReader, RestrictedModel
from jcrosslora.distill.teacher import Teacher
from jcrosslora.text import Completion

WEIGHTS = 0.5, 1.0, 0.25


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two bases that split text in different ways; the end of one is token 1, that of the other 2."""
    folder = tmp_path_factory.mktemp("ends")
    source = jcl.open_base(write_base(folder / "source", 30, bos=True, eos=1, layers=2))
    target = jcl.open_base(write_base(folder / "target", 90, eos=2, layers=2, hidden=32, head_dim=8, seed=1))
    return source, target


def completions(taught, ended=True):
    parts = [(text[:8], f" the water{text[-8:]}") for text in CORPUS[:4]]
    return [Completion(*part, ended=ended, taught=taught) for part in parts]


def lesson(bases, items, told=(), text_weight=0.0):
    """The first batch of completions, its columns, and how it is taught; `told` have the tokens that are compared."""
    tokenizers = load_tokenizer(bases[0]), load_tokenizer(bases[1])
    batches, others = (make_batches(part, tokenizers, 1.0, text_weight=text_weight) for part in (items, told or items))
    columns = find_columns(*bases, others, 40, end_tokens(tokenizers, items))
    counts = [len(side) for side in columns.ends]
    src, tgt = (
        RestrictedModel.of(load_model(base), columns.head_rows(side), counts[side]) for side, base in enumerate(bases)
    )
    reader = DecoderReader(src.with_adapter(stack_adapter(random_adapter(bases[0], scale=0.3), bases[0])))
    return batches[0], columns, Teacher(reader, tgt, columns, WEIGHTS).read(batches[0])


def said(batch, columns, taught):
    """Which of the target's tokens the teacher is sure of at each place; the end is -1."""
    tokens = np.append(columns.tokens(1), -1)
    probability = np.exp(np.asarray(taught.teacher))
    sure = (probability.max(axis=1) > 0.999) & (np.asarray(taught.weight) > 0)
    return {batch.at_tgt[place]: tokens[probability[place].argmax()] for place in np.flatnonzero(sure)}


@pytest.mark.parametrize("ended", [True, False])
def test_right_answers_are_taught_in_the_targets_tokens(bases, ended):
    batch, columns, taught = lesson(bases, completions("answer", ended))
    told = said(batch, columns, taught)
    tokens, mask = batch.tokens_tgt.ravel(), batch.mask_tgt.ravel()
    assert batch.rows == 4
    assert columns.text_columns(batch).max() > len(columns.shared[0])  # the two split the answers in different ways
    for place in batch.at_tgt[batch.answer]:
        last = place + 1 == len(tokens) or not mask[place + 1]
        if last and not ended:
            assert place not in told
        else:
            assert told[place] == (-1 if last else tokens[place + 1])


def test_a_right_end_leaves_the_rest_to_the_source(bases):
    free, known = (lesson(bases, completions(taught)) for taught in ("nothing", "end"))
    batch = known[0]
    ends = batch.answer & (batch.next_tgt < 0) & (batch.weight > 0)
    assert ends.sum() == 4
    np.testing.assert_array_equal(batch.text_share == 1, ends)
    for name in ("teacher", "weight"):
        one, other = (np.asarray(getattr(found[2], name)) for found in (free, known))
        np.testing.assert_array_equal(one[~ends], other[~ends])
    assert [said(*known)[place] for place in batch.at_tgt[ends]] == [-1] * 4
    assert not any(place in said(*free) for place in batch.at_tgt[ends])


def test_without_a_token_that_ends_a_text_no_end_is_taught(bases, tmp_path):
    silent = jcl.open_base(write_base(tmp_path / "silent", 30, bos=True, layers=2))
    both = silent, bases[1]
    assert not load_tokenizer(silent).stops
    free, known = (lesson(both, completions(taught))[2] for taught in ("nothing", "end"))
    np.testing.assert_array_equal(free.teacher, known.teacher)


def test_known_tokens_that_are_not_compared_keep_the_teachers_predictions(bases):
    told = [Completion(text, " a") for text in CORPUS[:4]]
    free, known = (lesson(bases, completions(taught), told=told) for taught in ("nothing", "answer"))
    batch, columns, taught = known
    without = (batch.text_share > 0) & (columns.text_columns(batch) < 0)
    assert without.sum() > 0
    for name in ("teacher", "weight"):
        one, other = (np.asarray(getattr(found, name)) for found in (free[2], taught))
        np.testing.assert_array_equal(one[without], other[without])


def test_known_tokens_weigh_as_much_as_any_others(bases):
    items = [
        dataclasses.replace(item, taught="answer" if place < 2 else "nothing")
        for place, item in enumerate(completions("nothing"))
    ]
    batch, _, taught = lesson(bases, items)
    known = batch.text_share > 0
    assert known.any()
    assert (np.asarray(taught.weight)[known] == 1).all()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_of_likely_answers_the_text_has_a_share_of_the_teacher(bases, share):
    items = [dataclasses.replace(item, greedy=True) for item in completions("nothing")]
    batch, columns, mixed = lesson(bases, items, text_weight=share)
    free = lesson(bases, items)[2]
    named = columns.text_columns(batch)
    told = (named >= 0) & (np.asarray(mixed.weight) > 0)
    assert told.sum() > 20
    sure = np.eye(mixed.teacher.shape[1])[named]
    wanted = (1 - share) * np.exp(np.asarray(free.teacher)) + share * sure
    np.testing.assert_allclose(np.exp(np.asarray(mixed.teacher))[told], wanted[told], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(mixed.teacher)[named < 0], np.asarray(free.teacher)[named < 0])
