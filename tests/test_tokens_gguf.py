"""Tokenizers built from GGUF metadata behave as those that the metadata come from."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import real_model
from tiny_tokenizers import KINDS

from jcrosslora.checkpoint import load_tokenizer, open_base
from jcrosslora.checkpoint.tokenizer_gguf import bos_of, build_backend, eos_of
from jcrosslora.checkpoint.vocabulary import gguf_vocabulary
from jcrosslora.errors import CheckpointError

PATH = Path("model.gguf")
REAL = {"SmolLM2-135M-Instruct.Q4_1.gguf": None, "gemma-3-270m-q4_k_m.gguf": 2}


def byte_level_metadata(pre="gpt-2"):
    model = json.loads(KINDS["byte-level"]().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
    }


def sentencepiece_metadata(**changes):
    space = "\u2581"
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    normal = [space + "the", "the", "th", space, *"abcdehtlé日本"]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, "\n\n", "  ", *normal]
    scores = [0.0] * 261 + [-2.0, -1.0, 0.0, *(-float(100 + n) for n in range(len(normal) - 3))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4, 4] + [1] * len(normal),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
    } | changes


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.sampled_from("the sun, moon.é日🎉\n '7½"), max_size=20))
def test_a_byte_level_tokenizer_is_rebuilt_from_its_metadata(text):
    own, built = KINDS["byte-level"](), build_backend(byte_level_metadata(), PATH)
    own.post_processor = None
    assert built.encode(text).ids == own.encode(text).ids
    assert built.encode(text).offsets == own.encode(text).offsets
    assert built.decode(built.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "text", "wanted"),
    [
        ("gpt-2", "a 12 b's", ["a", " 12", " b", "'s"]),
        ("smollm", "a 12 b's", ["a", " ", "1", "2", " b", "'s"]),
        ("llama-bpe", "a 1234 B'S\n\n x", ["a", " ", "123", "4", " B", "'S", "\n\n", " x"]),
        ("qwen2", "a 12 b'S", ["a", " ", "1", "2", " b", "'S"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", " ", "1", "2"]),
    ],
)
def test_text_is_split_by_the_rule_in_the_metadata(pre, text, wanted):
    backend = build_backend(byte_level_metadata(pre), PATH)
    pieces = [text[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == wanted


def test_a_file_that_does_not_state_its_rule_is_refused_where_it_is_not_that_of_gpt2():
    stated = byte_level_metadata()
    del stated["tokenizer.ggml.pre"]
    assert build_backend(stated | {"general.architecture": "starcoder2"}, PATH)
    for architecture in ("llama", "qwen2", "qwen2moe", "qwen3"):
        with pytest.raises(CheckpointError, match="does not state how text is split"):
            build_backend(stated | {"general.architecture": architecture}, PATH)


def test_markers_of_phi3_take_the_space_behind_them_along():
    types = sentencepiece_metadata()["tokenizer.ggml.token_type"]
    types[259] = 3  # the first token after the bytes is made a marker
    names = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    names[259] = "<|user|>"
    stated = sentencepiece_metadata(**{"tokenizer.ggml.token_type": types, "tokenizer.ggml.tokens": names})
    for architecture, wanted in (("phi3", ["<|user|>", "the"]), ("llama", ["<|user|>", "<0x0A>", "the"])):
        backend = build_backend(stated | {"general.architecture": architecture}, PATH)
        assert [backend.id_to_token(one) for one in backend.encode("<|user|>\nthe").ids] == wanted


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes():
    backend = build_backend(sentencepiece_metadata(), PATH)
    tokens = backend.encode("a the  the\n\n語").tokens
    assert tokens == ["a", "\u2581the", "  ", "the", "\n\n", "<0xE8>", "<0xAA>", "<0x9E>"]
    assert backend.decode(backend.encode("a the  the\n\n語").ids) == "a the  the\n\n語"
    prefixed = build_backend(sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": True}), PATH)
    assert prefixed.encode("the a").tokens == ["\u2581the", "\u2581", "a"]
    assert prefixed.decode(prefixed.encode("the a").ids) == "the a"


def gemma4_metadata(**changes):
    """Build a vocabulary in which scores would lead to other merges than the list of them."""
    space, metadata = "\u2581", sentencepiece_metadata()
    normal = ["\n", "\n\n", "\n\n\n", space, *"abcehtlé", "th", "he", space + "th", space + "the", "the"]
    tokens = [*metadata["tokenizer.ggml.tokens"][:259], "<|call>", *normal]
    merges = ["t h", "h e", f"{space} th", f"{space}th e", "th e"]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4] + [1] * len(normal),
        "tokenizer.ggml.bos_token_id": 1,
    } | changes


def test_the_tokenizer_of_gemma4_merges_by_its_list_and_keeps_runs_of_line_ends():
    backend = build_backend(gemma4_metadata(), PATH)
    space = "\u2581"
    text = "the the\n\nthe  a<|call>\n the\n\n\n\n\n日"
    wanted = ["the", f"{space}the", "\n\n", "the", space, space, "a", "<|call>", "\n", f"{space}the", *["\n"] * 5]
    assert backend.encode(text).tokens == [*wanted, "<0xE6>", "<0x97>", "<0xA5>"]
    assert backend.encode("a\n\n\na").tokens == ["a", "\n\n\n", "a"]
    assert backend.decode(backend.encode(text).ids, skip_special_tokens=False) == text
    assert bos_of(gemma4_metadata()) == 1


def test_the_vocabulary_of_gemma4_is_read():
    metadata = gemma4_metadata()
    tokens, found = metadata["tokenizer.ggml.tokens"], gguf_vocabulary(metadata, 1000).tokens
    assert found is not None
    wanted = {b" the": "\u2581the", b"\n\n": "\n\n", b"<|call>": "<|call>", b"\xe6": "<0xE6>", b"a": "a"}
    assert {token: tokens[found[token]] for token in wanted} == wanted


def test_merges_are_ordered_by_score():
    scores = {"<unk>": 0.0, "a": -9.0, "b": -8.0, "ab": -2.0, "aab": -1.0, "aa": -5.0, "x": 0.0, "xy": 0.0}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(scores),
        "tokenizer.ggml.scores": list(scores.values()),
        "tokenizer.ggml.token_type": [2] + [1] * (len(scores) - 1),
    }
    model = json.loads(build_backend(metadata, PATH).to_str())["model"]
    assert model["merges"] == [["a", "ab"], ["aa", "b"], ["a", "b"], ["a", "a"]]


def test_bos_has_a_default_if_the_metadata_do_not_state_it():
    ids = {"tokenizer.ggml.bos_token_id": 5}
    assert bos_of(ids | {"tokenizer.ggml.model": "llama"}) == 5
    assert bos_of(ids | {"tokenizer.ggml.model": "gpt2"}) is None
    for pre in ("llama-bpe", "tekken"):
        assert bos_of(ids | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}) == 5
    assert bos_of(ids | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False}) is None
    assert bos_of({"tokenizer.ggml.model": "llama"}) is None
    assert eos_of({"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 4}) == [2, 4, None]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "is of kind None"),
        ({"tokenizer.ggml.model": "t5"}, "is of kind 't5'"),
        (byte_level_metadata("viking"), "the rule 'viking'"),
        (byte_level_metadata() | {"tokenizer.ggml.tokens": None}, "tokens is no list of str"),
        (byte_level_metadata() | {"tokenizer.ggml.token_type": [1]}, "with 1 types"),
        (byte_level_metadata() | {"tokenizer.ggml.merges": ["a b c"]}, "a merge in tokenizer.ggml.merges"),
        (byte_level_metadata() | {"tokenizer.ggml.merges": ["zz qq"]}, "a merge in tokenizer.ggml.merges"),
        (byte_level_metadata() | {"tokenizer.ggml.merges": [3]}, "merges is no list of str"),
        (gemma4_metadata(**{"tokenizer.ggml.merges": None}), "merges is no list of str"),
        (sentencepiece_metadata(**{"tokenizer.ggml.scores": [0.0]}), "1 scores for"),
        (sentencepiece_metadata(**{"tokenizer.ggml.unknown_token_id": 10**6}), "1000000 as the unknown one"),
    ],
)
def test_invalid_metadata_are_refused(metadata, message):
    with pytest.raises(CheckpointError) as caught:
        build_backend(metadata, PATH)
    assert message in str(caught.value)
    assert str(caught.value).startswith("model.gguf: ")


@pytest.mark.full
@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_gguf_tokenizers_round_trip(name):
    tokenizer = load_tokenizer(open_base(real_model(name)))
    assert tokenizer.bos == REAL[name]
    for text in ("Hello, world! 12 345", "Héllo 日本語 👩\u200d🚀𓀀 x", "  a  b\n\n\n c\t"):
        encoded = tokenizer.encode(text)
        assert tokenizer.decode(encoded.ids) == text
        assert encoded.ends[-1] == len(text)
    if REAL[name]:  # ids of Gemma's own tokenizer
        assert tokenizer.encode("Hello, world!").ids.tolist() == [2, 9259, 236764, 1902, 236888]
