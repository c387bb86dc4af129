"""Predictions of one tokenizer in the columns of another: splits of the same text that differ."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes_matching import PieceTokenizer

from jcrosslora.distill.batches import DistillationBatch, make_batches
from jcrosslora.distill.output_columns import NO_SPLITS, MassTransfer, OutputColumns, _count_splits, in_target_columns
from jcrosslora.text import Completion, read

# Source: int 10, ent 11, in 12, cat 13; target: intent 20, in 22, cat 23, ca 24, t 25. Shared: in, cat.
COLUMNS = OutputColumns(
    shared=(np.array([12, 13], np.int32), np.array([22, 23], np.int32)),
    own=(np.array([10, 11], np.int32), np.array([20, 24, 25], np.int32)),
)
IN, CAT, INT, ENT = range(4)  # columns of the source
INTENT, CA, T = 2, 3, 4  # columns of the target behind those that are shared


def batch_of(next_src, next_tgt, answer):
    size = len(next_src)
    empty = np.zeros((1, 1), np.int32)
    places = np.zeros(size, np.int32)
    following = np.array(next_src, np.int32), np.array(next_tgt, np.int32)
    read, each = (empty, empty > 0, empty, empty > 0, places, places), np.array(answer)
    return DistillationBatch(*read, *following, each, np.zeros(size, np.float32), np.ones(size, np.float32))


def test_tokens_that_begin_another_split_give_their_probability_to_the_targets_token():
    #        the same token   int -> intent   cat -> ca    inside ca, t   nothing follows   a split in the prompt
    next_src, next_tgt = [13, 10, 13, -1, -1, 10], [23, 20, 24, 25, -1, 20]
    moves, weight = COLUMNS.moves(batch_of(next_src, next_tgt, [True] * 5 + [False]))
    moved, to = moves.moved, moves.to
    assert moved.tolist() == [-1, INT, CAT, -1, -1, -1]
    assert to.tolist() == [-1, INTENT, CA, T, -1, -1]
    assert weight.tolist() == [1, 1, 1, 1, 1, 0]
    p = np.array([0.1, 0.2, 0.4, 0.3])
    source = np.log(np.tile(p, (6, 1))).astype(np.float32)
    found = np.exp(
        np.asarray(in_target_columns(source, MassTransfer(NO_SPLITS, moved, moved, to), (2, 3, False)), np.float64)
    )
    np.testing.assert_allclose(found[0], np.array([0.1, 0.2, 0, 0, 0]) / 0.3, atol=1e-6)
    np.testing.assert_allclose(found[1], np.array([0.1, 0.2, 0.4, 0, 0]) / 0.7, atol=1e-6)
    np.testing.assert_allclose(found[2], np.array([0.1, 0, 0, 0.2, 0]) / 0.3, atol=1e-6)
    np.testing.assert_allclose(found[3], [0, 0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(found[4], found[0], atol=1e-6)


def test_tokens_are_split_as_they_are_elsewhere():
    """Of what begins with "int" all answers go on as "intent", and of four cats one is "ca"."""
    one = batch_of([10, 13, 13, 10, -1, 10], [20, 23, 24, 20, 25, 22], [True] * 5 + [False])
    two = batch_of([13, 13, 11, 99], [23, 23, 99, 25], [True] * 4)
    found = _count_splits(COLUMNS, [one, two])
    pairs = dict(zip(zip(found.source.tolist(), found.target.tolist(), strict=True), found.share.tolist(), strict=True))
    assert pairs == pytest.approx({(INT, INTENT): 2 / 3, (CAT, CA): 1 / 5})
    p = np.array([0.1, 0.2, 0.4, 0.3])
    source = np.log(np.tile(p, (3, 1))).astype(np.float32)
    said, none = np.array([-1, CAT, INT], np.int32), np.full(3, -1, np.int32)
    given = in_target_columns(source, MassTransfer(found, said, none, none), (2, 3, False))
    other, cat, int_ = np.exp(np.asarray(given, np.float64))
    # The columns: in, cat; intent, ca, t.
    wanted = np.array([0.1, 0.2 * 4 / 5, 0.4 * 2 / 3, 0.2 / 5, 0])
    np.testing.assert_allclose(other, wanted / wanted.sum(), atol=1e-6)
    wanted = np.array([0.1, 0.2, 0.4 * 2 / 3, 0, 0])
    np.testing.assert_allclose(cat, wanted / wanted.sum(), atol=1e-6)
    wanted = np.array([0.1, 0.2 * 4 / 5, 0, 0.2 / 5, 0])
    np.testing.assert_allclose(int_, wanted / wanted.sum(), atol=1e-6)


def test_without_splits_nothing_is_counted():
    assert len(_count_splits(COLUMNS, [batch_of([13, 12, -1], [23, 22, -1], [True] * 3)]).source) == 0
    rounded = dataclasses.replace(COLUMNS, rounded=True)
    found = _count_splits(rounded, [batch_of([10], [20], [True])])
    assert len(found.source) == len(found.share) == 512
    assert found.share.sum() == 0.5


def test_tokens_without_a_column_are_left_out():
    moves, weight = COLUMNS.moves(batch_of([99, 10, -1], [20, 99, 99], [True] * 3))
    moved, to = moves.moved, moves.to
    assert moved.tolist() == to.tolist() == [-1] * 3
    assert weight.tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1000), st.booleans())
def test_probabilities_stay_those_of_the_text(seed, end):
    """Whatever moves, what remains are probabilities, in proportion to those of the source."""
    rng = np.random.default_rng(seed)
    shared, own, count = 4, 3, 5
    source = np.log(rng.dirichlet(np.ones(shared + 2 + end), count)).astype(np.float32)
    moved, to = rng.integers(-1, shared + 2, count), rng.integers(-1, shared + own, count)
    moved = np.where(to < 0, -1, moved).astype(np.int32)
    found = np.asarray(
        in_target_columns(source, MassTransfer(NO_SPLITS, moved, moved, to.astype(np.int32)), (shared, own, end)),
        np.float64,
    )
    assert found.shape == (count, shared + own + end)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)
    for row in range(count):
        p = np.exp(source[row].astype(np.float64))
        wanted = np.concatenate([p[:shared], np.zeros(own), p[shared + 2 :]])
        if to[row] >= 0 and moved[row] >= 0:
            mass = p[moved[row]]
            wanted[moved[row]] = 0 if moved[row] < shared else wanted[moved[row]]
            wanted[to[row]] += mass
        elif to[row] >= 0:
            wanted = np.eye(shared + own + end)[to[row]]
        np.testing.assert_allclose(np.exp(found[row]), wanted / wanted.sum(), atol=1e-5)


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (4, 1), (1, 4), (2, 2)])
def test_every_token_of_the_targets_answer_is_taught_once(sizes):
    source, target = (PieceTokenizer(size, bos=7) for size in sizes)
    item = Completion("a prompt of text: ", "and an answer of 24 signs")
    (batch,) = make_batches([item], (source, target), 1.0)
    ids = target.encode(item.text).ids
    used = batch.answer & (batch.weight > 0)
    places = np.sort(batch.at_tgt[used])
    first = int(np.argmax(target.encode(item.text).ends > len(item.prompt)))
    np.testing.assert_array_equal(places, np.arange(first - 1, len(ids)))
    following = dict(zip(batch.at_tgt[used].tolist(), batch.next_tgt[used].tolist(), strict=True))
    assert [following[place] for place in places] == [*ids[first:].tolist(), -1]
    # Positions that match end at one character; those inside a token of the source have none there.
    ends = source.encode(item.text).ends, target.encode(item.text).ends
    matched = used & (batch.at_src > 0)
    np.testing.assert_array_equal(ends[0][batch.at_src[matched]], ends[1][batch.at_tgt[matched]])
    assert (batch.next_src[used & (batch.at_src == 0)] == -1).all()


@pytest.mark.parametrize("sizes", [(2, 3), (4, 1), (2, 2)])
@pytest.mark.parametrize("ended", [True, False])
def test_what_is_right_of_an_answer_are_tokens_of_the_target(sizes, ended):
    source, target = (PieceTokenizer(size, bos=7, eos=3) for size in sizes)
    found = {}
    for taught in ("nothing", "end", "answer"):
        item = Completion("a prompt of text: ", "and an answer of 24 signs", ended=ended, taught=taught)
        (batch,) = make_batches([item], (source, target), 1.0)
        found[taught] = dict(
            zip(*(places[batch.text_share == 1].tolist() for places in (batch.at_tgt, batch.next_tgt)), strict=True)
        )
    told = read(target, item)
    last = len(told.ids) - 1 - ended
    end = {last: -1} if ended else {}
    own = {place: told.ids[place + 1] for place in range(told.answer - 1, last)}
    assert found == {"nothing": {}, "end": end, "answer": own | end}
