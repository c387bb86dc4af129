"""Batches of prompts: which are put together, in which shapes, and which beginnings are read once."""

import numpy as np
import pytest

from jcrosslora.decoder import LONGEST_PROMPT, plan_batches
from jcrosslora.decoder.prompt_batches import PromptBatch, common_beginnings, plan_queues

WRITTEN = 20


def tokens(count, seed):
    return np.random.default_rng(seed).integers(0, 99, count).astype(np.int32)


def behind(beginning, lengths, seed=0):
    """Prompts that go on differently behind a common beginning."""
    ends = [np.concatenate([[number], tokens(length - 1, seed + number)]) for number, length in enumerate(lengths)]
    return [np.concatenate([beginning, end]).astype(np.int32) for end in ends]


def mixed():
    """Prompts behind beginnings of many lengths, and others, in an order that does not tell them apart."""
    found = [prompt for seed in range(13) for prompt in behind(tokens(40 + 29 * seed, seed), [5, 30, 9, 99, 17, 8, 21])]
    for seed in (50, 51):
        found += behind(tokens(1400 + seed, seed), [3, 60, 500][: 53 - seed])
    found += [tokens(length, 900 + length) for length in (1, 32, 33, 90, 400, 2048)]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


CASES = {
    "mixed": mixed(),
    "equal": [tokens(300, 0)] * 60,
    "equal and short": [tokens(33, 0)] * 60,
    "one instruction": behind(tokens(70, 0), range(1, 101)),
    "long beginnings": [prompt for seed in range(8) for prompt in behind(tokens(700, seed), [9] * 4)],
    "longest": behind(tokens(LONGEST_PROMPT - 64, 0), [64] * 9),
}


def whole_of(batch: PromptBatch):
    """The prompts of a batch, put together again."""
    if batch.beginnings is None:
        return batch.texts
    owned = [batch.beginnings.tokens[owner] for owner in batch.beginnings.owners]
    return [np.concatenate(pair) for pair in zip(owned, batch.texts, strict=True)]


def unshared(batches):
    return [(batch.places, batch.shape) for batch in batches if batch.beginnings is None]


@pytest.mark.parametrize("name", CASES)
def test_every_prompt_is_in_one_batch_whole(name):
    ids, seen = CASES[name], []
    batches = plan_batches(ids, WRITTEN, share=True)
    assert any(batch.beginnings for batch in batches)
    for batch in batches:
        for place, found, text in zip(batch.places, whole_of(batch), batch.texts, strict=True):
            np.testing.assert_array_equal(found, ids[place])
            assert len(text) > 0
        seen += batch.places
    assert sorted(seen) == list(range(len(ids)))


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_bounded_and_few(name):
    for batch in plan_batches(CASES[name], WRITTEN, share=True):
        rows, width = batch.shape
        assert max(map(len, batch.texts)) <= width <= LONGEST_PROMPT
        assert len(batch.texts) <= rows <= 48
        assert rows * width <= 48 * 96
        if batch.beginnings is not None:
            groups, longest = batch.beginnings.shape
            lengths = [len(one) for one in batch.beginnings.tokens]
            assert len(lengths) <= groups
            assert groups in (1, 2, 4, 8)
            assert max(lengths) <= longest <= max(96, 2 * min(lengths))
            assert all(length >= 32 and length % 16 == 0 for length in lengths)
            assert longest % 16 == width % 16 == 0
            assert groups * longest <= 48 * 96
            assert rows * (longest + width) <= 48 * 512


def test_lists_in_front_of_prompts_are_read_once_and_many_rows_are_written_together():
    ids = [prompt for seed in range(6) for prompt in behind(tokens(256, seed), [40] * 8, seed)]
    (batch,) = plan_batches(ids, WRITTEN, share=True)
    assert batch.shape == (48, 48)
    assert batch.beginnings is not None
    assert batch.beginnings.shape == (8, 256)
    assert len(plan_batches(ids, WRITTEN, share=False)) == 4


def test_prompts_without_a_common_beginning_stay_in_the_batches_of_their_own():
    alone = [tokens(length, length) for length in range(20, 80)]
    together = behind(tokens(200, 0), [9] * 30)
    order = np.random.default_rng(1).permutation(len(alone + together))
    mixed = [(alone + together)[place] for place in order]
    own = [place for place in range(len(mixed)) if len(mixed[place]) < 80]
    wanted = plan_batches([mixed[place] for place in own], WRITTEN, share=False)
    found = unshared(plan_batches(mixed, WRITTEN, share=True))
    assert found == [([own[place] for place in batch.places], batch.shape) for batch in wanted]


@pytest.mark.parametrize(
    ("ids", "written"),
    [
        ([tokens(200, seed) for seed in range(60)], WRITTEN),
        # Nothing in common is as long as 32 tokens and has another token behind it.
        (behind(tokens(31, 0), [9] * 40), WRITTEN),
        ([tokens(32, 0)] * 40, WRITTEN),
        # What is saved is small beside what is written: many pairs would be written in more batches.
        ([prompt for seed in range(24) for prompt in behind(tokens(32, seed), [40, 50])], 100),
    ],
    ids=["unlike", "alike for too short", "too short", "not worth it"],
)
def test_where_nothing_is_saved_all_is_as_without_common_beginnings(ids, written):
    found = plan_batches(ids, written, share=True)
    assert unshared(found) == unshared(plan_batches(ids, written, share=False))
    assert all(batch.beginnings is None for batch in found)


def test_a_batch_without_prompts_is_none():
    assert plan_batches([], WRITTEN, share=True) == []


def test_groups_are_as_long_as_saves_most():
    instruction = tokens(64, 0)
    lists = [np.concatenate([instruction, tokens(112, seed)]) for seed in (1, 2)]
    ids = [*behind(lists[0], [9] * 5), *behind(lists[1], [9] * 4, 50), *behind(instruction, [20] * 3, 90)]
    assert [(group.places, group.length) for group in common_beginnings(ids)] == [
        ([0, 1, 2, 3, 4], 176),
        ([5, 6, 7, 8], 176),
        ([9, 10, 11], 64),
    ]
    # Two prompts that are alike for a little longer are not worth a beginning of their own.
    pairs = behind(instruction, [40] * 6)
    pairs += [np.concatenate([pairs[0][:90], tokens(20, 7)])]
    assert [(group.places, group.length) for group in common_beginnings(pairs)] == [(list(range(7)), 64)]


def test_a_common_beginning_ends_in_front_of_the_last_token_of_the_shortest():
    first = tokens(200, 0)
    (group,) = common_beginnings([first, first[:64], first[:70]])
    assert group == ([0, 1, 2], 48)
    (group,) = common_beginnings([first, first[:65]])
    assert group == ([0, 1], 64)


def test_every_batch_of_a_queue_fits_into_its_rows():
    """Of prompts with long beginnings in common, where much may be written: a batch with more slots may be fuller."""
    rng, ids = np.random.default_rng(0), []
    for count, common, own in ((21, 247, 1470), (28, 1570, 205)):
        beginning = rng.integers(0, 280, common).astype(np.int32)
        ids += [np.concatenate([beginning, rng.integers(0, 280, own).astype(np.int32)]) for _ in range(count)]
    for turns, rows, _ in plan_queues(plan_batches(ids, 1536, share=True, most=8), 1536):
        assert all(len(turn.places) <= rows for turn in turns)
