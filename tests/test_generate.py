"""Answers to prompts: what is read, where an answer ends, and that a batch gives what each prompt gives alone."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers
from probe_bases import write_base
from tokenizers import decoders, models, normalizers

from jcrosslora.checkpoint import Tokenizer, open_base
from jcrosslora.checkpoint.tokenizer import load_tokenizer
from jcrosslora.decoder import LONGEST_PROMPT, Generator, plan_batches
from jcrosslora.decoder.generate import as_written, cut_ids
from jcrosslora.decoder.prompt_batches import PromptBatch
from jcrosslora.text import Message, prompt_ids

KEY = jax.random.key(0)
PROMPTS = ["Water boils at", "Anna", (Message("user", "What jumps?"),), "The quick brown fox jumps over the lazy " * 20]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return Generator.of(open_base(write_base(tmp_path_factory.mktemp("base"), 60, eos=1)))


def greedy_by_hand(generator, prompt, count):
    """What is written behind one prompt without padding, up to and including the token that ends it."""
    ids = prompt_ids(generator.tokenizer, prompt)
    (row,) = generator._continue(PromptBatch([0], [ids], (1, len(ids))), (count, 0.0, KEY), pad_left=False)
    return row


def test_a_batch_gives_what_each_prompt_gives_alone(generator):
    for prompt, found in zip(PROMPTS, generator.write(PROMPTS, 6, 0.0, KEY), strict=True):
        row = greedy_by_hand(generator, prompt, 6)
        ended = row[-1] == generator.tokenizer.eos
        assert (found.tokens, found.ended) == (len(row), ended)
        assert found.text == generator.decode(row[: len(row) - ended])


def test_answers_that_end_are_told_from_those_that_are_cut_off(generator):
    often = dataclasses.replace(generator.tokenizer, stops=tuple(range(1, 300, 3)))
    found = dataclasses.replace(generator, tokenizer=often).write(["Anna and Peter"] * 40, 3, 50.0, KEY)
    assert {one.ended for one in found} == {True, False}
    assert all(one.tokens == 3 for one in found if not one.ended)
    assert {one.tokens for one in found if one.ended} == {1, 2, 3}
    assert all(one.text == "" for one in found if one.ended and one.tokens == 1)


def test_texts_are_what_write_gives(generator):
    texts = [prompt for prompt in PROMPTS if isinstance(prompt, str)]
    assert generator.continue_texts(texts, 5, 1.0, KEY) == [one.text for one in generator.write(texts, 5, 1.0, KEY)]


def test_a_long_prompt_keeps_the_token_that_begins_a_text(tmp_path):
    tokenizer = load_tokenizer(open_base(write_base(tmp_path, 60, bos=True)))
    named = dataclasses.replace(tokenizer, bos=None, bos_name="<s>")  # as a chat template names it
    none = dataclasses.replace(tokenizer, bos=None, bos_name="")
    long = "Anna and Peter " * 1000
    for given, text, begun in ((tokenizer, long, 1), (named, f"<s>{long}", 1), (none, long, 0)):
        whole = prompt_ids(given, text)
        short, cut = cut_ids(given, ["Anna", text])
        np.testing.assert_array_equal(short, prompt_ids(given, "Anna"))
        assert len(cut) == LONGEST_PROMPT < len(whole)
        np.testing.assert_array_equal(cut, [*whole[:begun], *whole[len(whole) - LONGEST_PROMPT + begun :]])
        assert (cut[0] == tokenizer.bos) == begun


@pytest.mark.parametrize("lengths", [[3, 90, 96], [5] * 60, [97, 100, 128, 500], [40, 2048, 2048, 130], [97] * 50])
def test_batches_hold_every_prompt_once_in_shapes_of_bounded_size(lengths):
    ids = [np.zeros(length, np.int32) for length in sorted(lengths)]
    seen, shapes = [], set()
    for batch in plan_batches(ids, 10, share=False):
        rows, width = batch.shape
        assert 0 < len(batch.places) <= rows
        assert max(len(ids[place]) for place in batch.places) <= width <= LONGEST_PROMPT
        assert rows * width <= 48 * 96
        shapes.add((rows, width))
        seen += batch.places
    assert seen == list(range(len(ids)))
    assert len({width for _, width in shapes}) <= len(set(lengths))


@pytest.mark.parametrize(("texts", "rows"), [(1, 8), (8, 8), (9, 24), (24, 24), (25, 48), (90, 48)])
def test_batches_have_few_empty_rows(texts, rows):
    def first_shape(length):
        return plan_batches([np.zeros(length, np.int32)] * texts, 10, share=False)[0].shape

    assert first_shape(5) == (rows, 16)
    # Beside long texts fewer rows are written together: no more than these.
    assert first_shape(300) == (min(rows, 12), 384)


def test_what_follows_a_character_of_several_tokens_is_whole():
    """A decoder with a fallback to bytes decodes a run of byte tokens as a whole, or not at all."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁": 257, "▁a": 258, "a": 259}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    tokenizer = Tokenizer(None, (), len(vocabulary), "made", made)
    prompt, row = (tokenizer.encode(text).ids for text in ("a ሰላም", "ሰላም a"))
    assert as_written(tokenizer, prompt, row[1:]).text == "ሰላም a"
