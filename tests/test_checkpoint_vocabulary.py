"""Tokens as bytes, from tokenizer.json files of both styles."""

import json
from pathlib import Path

import pytest
from checkpoint_files import write_llama
from hypothesis import given
from hypothesis import strategies as st

from jcrosslora.checkpoint import open_base
from jcrosslora.checkpoint.vocabulary import byte_alphabet, decode_byte_level, decode_sentencepiece, read_tokenizer

BYTE_LEVEL = {
    "added_tokens": [
        {"id": 5, "content": "<|end|>", "special": True},
        {"id": 6, "content": " <tag>", "special": False},
    ],
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel", "add_prefix_space": False}],
    },
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "Ġthe": 1, "Ċ": 2, "Ã©": 3, "<|end|>": 5, "€": 4}},
}
SENTENCEPIECE = {
    "added_tokens": [
        {"id": 0, "content": "<unk>", "special": True},
        {"id": 8, "content": "▁▁", "special": False},
    ],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": None,
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
    "model": {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "<0x41>": 1, "<0x0A>": 2, "A": 3, "▁the": 4, "é": 5, "▁▁": 8},
    },
}
UNIGRAM = {
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁"},
    "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.0], ["b", -2.0]]},
}


def read(folder: Path, tokenizer, size: int = 100):
    text = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer)
    (folder / "tokenizer.json").write_text(text)
    return read_tokenizer(folder, size)


def test_byte_level_tokens_are_decoded(tmp_path: Path):
    # "€" is not in the byte alphabet, so byte-level text never gives this token.
    tokens = read(tmp_path, BYTE_LEVEL).tokens
    assert tokens == {b"a": 0, b" the": 1, b"\n": 2, "é".encode(): 3, b" <tag>": 6}


def test_sentencepiece_tokens_are_decoded(tmp_path: Path):
    # <0x41> and "A" both stand for b"A"; text gets the id of "A".
    tokens = read(tmp_path, SENTENCEPIECE).tokens
    assert tokens == {b"A": 3, b"\n": 2, b" the": 4, "é".encode(): 5, b"  ": 8}


def test_unigram_tokens_are_decoded(tmp_path: Path):
    assert read(tmp_path, UNIGRAM).tokens == {b" a": 1, b"b": 2}


def test_special_tokens_are_listed_by_name(tmp_path: Path):
    assert read(tmp_path, BYTE_LEVEL).special == {b"<|end|>": 5}
    assert read(tmp_path, SENTENCEPIECE).special == {b"<unk>": 0}
    assert read(tmp_path, UNIGRAM).special == {}
    assert read(tmp_path, BYTE_LEVEL, size=5).special == {}


def test_ids_beyond_the_embedding_are_skipped(tmp_path: Path):
    assert read(tmp_path, BYTE_LEVEL, size=2).tokens == {b"a": 0, b" the": 1}


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object was expected"),
        ({}, "form of a tokenizer"),
        ({"model": {"type": "BPE"}}, "neither byte-level nor sentencepiece"),
        ({"model": {"type": "WordPiece", "byte_fallback": True, "vocab": {}}}, "'WordPiece'"),
        ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {"a": "x"}}}, "form of a tokenizer"),
        ({"model": {"type": "BPE", "byte_fallback": True, "vocab": 3}}, "form of a tokenizer"),
        ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}}}, "lists no normal token"),
        ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}}, "added_tokens": 3}, "form of a tokenizer"),
        ('{"model": {"type": "BPE", "byte_fallback": true, "vocab": {"a": Infinity}}}', "form of a tokenizer"),
    ],
)
def test_an_unreadable_tokenizer_gives_its_reason(tmp_path: Path, tokenizer, reason: str):
    vocabulary = read(tmp_path, tokenizer)
    assert vocabulary.tokens is None
    assert reason in vocabulary.reason
    assert "\n" not in vocabulary.reason


def test_a_base_without_a_tokenizer_is_usable(tmp_path: Path):
    base = open_base(write_llama(tmp_path))
    assert base.vocabulary().tokens is None
    assert "no tokenizer.json" in base.vocabulary().reason
    (tmp_path / "tokenizer.json").write_text(json.dumps(BYTE_LEVEL))
    tokens = open_base(tmp_path).vocabulary().tokens
    assert tokens is not None
    assert tokens[b"a"] == 0


def test_the_byte_alphabet_is_a_bijection_of_printable_characters():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert all(character.isprintable() and not character.isspace() for character in alphabet)
    # Known spellings of space, newline, tab and DEL.
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["ĉ"], alphabet["ġ"]) == (0x20, 0x0A, 0x09, 0x7F)


@given(st.binary(max_size=20))
def test_byte_level_spelling_round_trips(raw: bytes):
    spelling = {byte: character for character, byte in byte_alphabet().items()}
    assert decode_byte_level("".join(spelling[byte] for byte in raw)) == raw


@given(st.text(max_size=10))
def test_sentencepiece_spelling_round_trips(text: str):
    if not text.startswith("<0x"):
        assert decode_sentencepiece(text.replace(" ", "▁")) == text.replace("▁", " ").encode()


def test_the_tokenizers_package_spells_bytes_the_same_way():
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(pre.alphabet()) == set(byte_alphabet())
    text = "".join(map(chr, range(0x20, 0x500))) + "𝄞\n\t"
    spelled = "".join(piece for piece, _ in pre.pre_tokenize_str(text))
    assert decode_byte_level(spelled) == text.encode()
