"""Questions in rows: each token is read once, at its position, and sees the text in front of it and nothing else."""

import numpy as np
import pytest

from jcrosslora.evaluate.packing import Tokens, packed


def question(seed, prefix, *tails, beginning=()):
    """A question of random tokens with tails of these lengths, scored from their second token on or later."""
    draw = np.random.default_rng(seed)
    own = [draw.integers(1, 1 << 30, length).astype(np.int32) for length in (prefix, *tails)]
    return Tokens(np.append(beginning, own[0]).astype(np.int32), tuple(own[1:]), (1, 2, 1, 1)[: len(tails)])


BEGINNING = np.arange(2000, 2064)
ALONE = [question(seed, 3 + 7 * seed, 4 + seed, 3, 5) for seed in range(9)]
SETS = {
    "several in a row": ALONE,
    "one choice": [question(seed, 5 + seed, 3 + seed) for seed in range(20)],
    "nothing in common": [question(seed, 0, 9, 12) for seed in range(3)],
    "a beginning in their row": [*ALONE, *(question(20 + seed, 5, 6, 7, beginning=BEGINNING) for seed in range(3))],
    "a beginning in front of rows": [question(seed, 9, 8, 7, beginning=BEGINNING) for seed in range(40)],
    "long": [question(1, 700, 5, 5), *ALONE],
}


def texts(batch):
    """For each scored token: its place, itself, and the tokens that the position before it sees, by position."""
    before = () if batch.beginnings is None else batch.beginnings[0][0][batch.beginnings[1][0]]
    seen, positions = np.asarray(batch.layout.seen(0)), np.asarray(batch.layout.positions)
    for slot, wanted, place in zip(batch.picked, batch.wanted, batch.places, strict=True):
        row, column = divmod(slot, batch.rows.shape[1])
        visible = seen[row, column] & (positions[row] >= 0)
        order = positions[row][visible]
        assert order.tolist() == list(range(len(order)))
        assert not (np.asarray(batch.layout.lengths)[row][visible] + len(before) < len(before) + len(order)).any()
        yield tuple(place), int(wanted), [*before, *batch.rows[row][visible]]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("positions", [1, 256, 4096])
def test_a_token_sees_its_text_and_nothing_else(name, positions):
    items, found = SETS[name], {}
    for batch in packed(items, positions, share=True):
        assert batch.rows.size <= positions or len(batch.rows) == 1
        for place, wanted, text in texts(batch):
            found.setdefault(place, []).append((wanted, text))
    for index, one in enumerate(items):
        for choice, (tail, first) in enumerate(zip(one.tails, one.scored, strict=True)):
            whole = [*one.prefix, *tail]
            start = len(one.prefix) + first
            assert found.pop((index, choice)) == [(whole[end], whole[:end]) for end in range(start, len(whole))]
    assert not found


@pytest.mark.parametrize("name", SETS)
def test_what_texts_have_in_common_is_read_once_in_a_batch(name):
    items = SETS[name]
    batches = list(packed(items, 4096, share=True))
    read = sum(int((np.asarray(one.layout.positions) >= 0).sum()) for one in batches)
    read += sum(int(one.beginnings[1].sum()) for one in batches if one.beginnings is not None)
    begin_alike = [one for one in items if one.prefix[: len(BEGINNING)].tolist() == BEGINNING.tolist()]
    assert read == sum(map(len, items)) - max(0, len(begin_alike) - 1) * len(BEGINNING)


def test_little_of_many_short_questions_is_padding():
    items = [question(seed, 30 + seed % 17, *(4 + (seed + place) % 9 for place in range(4))) for seed in range(100)]
    assert sum(one.rows.size for one in packed(items, 4096, share=True)) < 1.2 * sum(map(len, items))


def test_without_sharing_a_beginning_is_read_with_each_question():
    items = SETS["a beginning in front of rows"]
    batches = list(packed(items, 4096, share=False))
    assert all(one.beginnings is None for one in batches)
    assert sum(int((np.asarray(one.layout.positions) >= 0).sum()) for one in batches) == sum(map(len, items))
