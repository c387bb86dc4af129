"""Tokens and the characters at which they end, for byte-level and sentencepiece-style tokenizers in folders."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tiny_bases import llama_config, llama_tensors
from tiny_tokenizers import KINDS, write_tokenizer

from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.errors import CheckpointError, UsageError

TEXTS = {
    "ascii": "the sun, the  moon ",
    "accents": "él or e\u0301?",
    "cjk": "日本語 the 日",
    "emoji": "🎉 the 👩\u200d🚀x",
    "newlines": "\n\nthe\n",
}


def base_with(tmp_path, made=None, vocab=330):
    save_file(llama_tensors(vocab=vocab, layers=1), tmp_path / "model.safetensors")
    config = llama_config(vocab=vocab, layers=1) | {"eos_token_id": [2, 7]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if made is not None:
        write_tokenizer(tmp_path, made)
    return open_base(tmp_path)


@pytest.fixture(scope="module", params=KINDS)
def loaded(request, tmp_path_factory):
    return request.param, load_tokenizer(base_with(tmp_path_factory.mktemp("base"), KINDS[request.param]()))


def check_ends(tokenizer, text):
    """Check that the bytes of the tokens up to each end are the text up to that character."""
    encoded = tokenizer.encode(text)
    assert encoded.ids.dtype == encoded.ends.dtype == np.int32
    assert encoded.ids.shape == encoded.ends.shape
    if tokenizer.bos is not None:
        assert (encoded.ids[0], encoded.ends[0]) == (tokenizer.bos, 0)
    told = [(place, end) for place, end in enumerate(encoded.ends.tolist()) if end > 0]
    assert [end for _, end in told] == sorted(set(end for _, end in told))
    assert not text or told[-1] == (len(encoded.ids) - 1, len(text))
    for place, end in told:
        assert tokenizer.decode(encoded.ids[: place + 1]) == text[:end]
    for place in np.flatnonzero(encoded.ends < 0):
        # A part of a character decodes to a replacement mark; or the token is the added leading space.
        so_far = tokenizer.decode(encoded.ids[: place + 1])
        assert not text.startswith(so_far) or so_far == ""


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ends_count_characters(loaded, text):
    check_ends(loaded[1], text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("the sun.é日本語🎉\u0301\u200d\n½"), max_size=12))
def test_ends_are_right_for_any_text(loaded, text):
    check_ends(loaded[1], text)


def test_tokens_inside_a_character_have_no_end(loaded):
    _, tokenizer = loaded
    assert tokenizer.encode("🎉", special=False).ends.tolist()[-4:] == [-1, -1, -1, 1]


def test_stop_tokens_are_those_of_generation_config_and_of_the_format(tmp_path):
    """gpt-oss closes every message with <|end|>, and a turn with one of two others."""
    made = KINDS["byte-level"]()
    made.add_special_tokens(["<|end|>", "<|im_end|>"])
    base = base_with(tmp_path, made)
    ends = {name: made.token_to_id(name) for name in ("<|end|>", "<|im_end|>")}
    assert set(load_tokenizer(base).stops) == {2, 7, *ends.values()}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert set(load_tokenizer(open_base(tmp_path)).stops) == {2, 7, 9, *ends.values()}
    made.add_special_tokens(["<|return|>", "<|call|>"])
    found = load_tokenizer(base_with(tmp_path, made)).stops
    assert {made.token_to_id(name) for name in ("<|im_end|>", "<|return|>", "<|call|>")} < set(found)
    assert ends["<|end|>"] not in found


def test_bos_and_stop_tokens_are_found(loaded):
    kind, tokenizer = loaded
    assert tokenizer.bos == (None if kind == "byte-level" else 1)
    assert tokenizer.stops == (2, 7)
    assert tokenizer.encode("").ids.tolist() == ([] if tokenizer.bos is None else [1])
    assert tokenizer.encode("a", special=False).ids.tolist() == tokenizer.encode("a").ids.tolist()[tokenizer.bos or 0 :]
    assert tokenizer.decode([1, *tokenizer.encode("the").ids, 2]) == "the"


def test_half_a_surrogate_pair_is_refused(loaded):
    with pytest.raises(UsageError, match="character 1"):
        loaded[1].encode("a\ud800")


def test_a_token_beyond_the_embedding_is_refused(tmp_path):
    tokenizer = load_tokenizer(base_with(tmp_path, KINDS["byte-level"](), vocab=100))
    with pytest.raises(CheckpointError, match="its embedding has 100 rows"):
        tokenizer.encode("é the")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no tokenizer.json"),
        ("{", "not valid JSON"),
        ("[]", "JSON object was expected"),
        ("{}", "the tokenizer cannot be read"),
        ('{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}', "the tokenizer cannot be read"),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, content, message):
    base = base_with(tmp_path)
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(base)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
