"""GGUF files without torch: the header against the gguf package, quantised types, bad files, two real models."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf_files import gguf, small_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import real_model

from jcrosslora.checkpoint import MappedFile, open_base
from jcrosslora.checkpoint.gguf_header import read_header
from jcrosslora.errors import CheckpointError

SIZES = {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
TOKENS = ("gpt2", ["a", "Ġb", "<s>", "é", "Ċ", "<|im|>", "x", "y", "z", "w"], [1, 1, 3, 1, 1, 4, 5, 2, 1, 1])


def test_the_header_equals_what_the_gguf_reader_finds(tmp_path: Path):
    extra = {"general.name": "x", "some.list": [1, 2, 3], "some.texts": ["a", "b"], "some.number": 2.5}
    path, _ = small_llama(tmp_path / "x.gguf", extra, tokens=TOKENS)
    header, reader = read_header(MappedFile(path), SIZES), gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(header.metadata) == theirs
    assert set(header.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.kind, info.start) == (tensor.tensor_type, tensor.data_offset)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_gguf_weights_are_dequantised(kind: str, tmp_path: Path):
    quant = gguf.GGMLQuantizationType[kind]
    path, tensors = small_llama(tmp_path / "x.gguf", kind=quant)
    base = open_base(path)
    for name, array in tensors.items():
        # Blocks do not cross rows, so reordering rows and quantisation commute.
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, quant), quant) if array.ndim == 2 else array
        read = base.tensor(name)
        assert np.array_equal(read.astype(np.float32), expected), name
        if array.ndim == 2:
            ids = np.array([3, 1, 1])
            assert np.array_equal(base.rows(name, ids), expected[ids]), name
            assert base.rows(name, ids).dtype == np.float32
    stored = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert base.weight("model.layers.1.self_attn.q_proj").dtype.name == stored
    assert base.modules["model.layers.1.self_attn.q_proj"].dtype == kind


def test_vocabulary_and_name_come_from_the_metadata(tmp_path: Path):
    path, _ = small_llama(tmp_path / "x.gguf", {"general.name": "Small one"}, tokens=TOKENS)
    base = open_base(path)
    assert base.name == "Small one"
    assert base.vocabulary().tokens == {
        b"a": 0, b" b": 1, "é".encode("latin-1"): 3, b"\n": 4, b"<|im|>": 5, b"z": 8, b"w": 9,
    }  # fmt: skip
    source = {"general.name": "x", "general.source.repo_url": "https://huggingface.co/org/model"}
    path, _ = small_llama(tmp_path / "y.gguf", source)
    base = open_base(path)
    assert base.name == "org/model"
    assert base.vocabulary().tokens is None
    assert "None is not supported" in base.vocabulary().reason
    assert open_base(path, name="me/mine").name == "me/mine"


def test_an_invalid_kind_of_tokenizer_is_given_as_the_reason(tmp_path: Path):
    path, _ = small_llama(tmp_path / "x.gguf", {"tokenizer.ggml.model": ["gpt2"]})
    assert "['gpt2'] is not supported" in open_base(path).vocabulary().reason


def test_a_sentencepiece_vocabulary_is_read_from_the_metadata(tmp_path: Path):
    texts = ["<unk>", "<s>", "<0x41>", "<0x0A>", "A", "▁the", "▁▁", "<b>", "é", "unused"]
    path, _ = small_llama(tmp_path / "x.gguf", tokens=("llama", texts, [2, 3, 6, 6, 1, 1, 1, 4, 1, 5]))
    vocabulary = open_base(path).vocabulary()
    assert vocabulary.tokens == {
        b"A": 4, b"\n": 3, b" the": 5, b"  ": 6, b"<b>": 7, "é".encode(): 8,
    }  # fmt: skip
    assert vocabulary.special == {b"<unk>": 0, b"<s>": 1}


def test_rope_scaling_is_read_from_the_metadata(tmp_path: Path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path, _ = small_llama(tmp_path / "a.gguf", linear)
    assert open_base(path).config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
    path, _ = small_llama(tmp_path / "b.gguf", yarn)
    assert open_base(path).config["rope_parameters"]["original_max_position_embeddings"] == 16


ONES = np.ones(8, np.float32)
BAD_MODELS = {
    "unknown architecture": ({"arch": "mamba"}, "architecture 'mamba' is not supported; supported: llama, qwen2"),
    "a projector": ({"metadata": {"general.type": "mmproj"}}, "GGUF of type 'mmproj'"),
    "one of several parts": ({"metadata": {"split.count": 3}}, "one of 3 parts"),
    "experts": ({"metadata": {"expert_count": 8}}, "num_experts_per_tok' is None"),
    "unknown tensor": ({"extra": {"blk.0.attn_gate.weight": (ONES, None)}}, "'blk.0.attn_gate.weight' is not known"),
    "missing tensor": ({"drop": ("blk.1.ffn_up.weight",)}, "layers.1.mlp.up_proj.weight is missing"),
    "missing embedding": ({"drop": ("token_embd.weight",)}, "token_embd.weight"),
    "missing size": ({"metadata": {"embedding_length": ...}}, "'hidden_size' is None"),
    "size is text": ({"metadata": {"embedding_length": "64"}}, "embedding_length is '64'"),
    "heads by layer": ({"metadata": {"attention.head_count": [4, 4]}}, "head_count is"),
    "heads do not split": ({"metadata": {"attention.head_count": 5}}, "do not split into 5 heads"),
    "more layers": ({"metadata": {"block_count": 3}}, "config says 3 layers, the weights hold 2"),
    "wrong width": ({"metadata": {"feed_forward_length": 97}}, "has shape"),
    "rope type": ({"metadata": {"rope.scaling.type": "odd", "rope.scaling.factor": 2.0}}, "rope scaling 'odd'"),
    "rope base": ({"metadata": {"rope.freq_base": "big"}}, "freq_base is 'big'"),
    "negative rope base": ({"metadata": {"rope.freq_base": -2.0}}, "expected a positive number"),
    "rope factors": ({"extra": {"rope_freqs.weight": (3 * ONES, None)}}, "llama3 rule"),
    "integer weights": ({"extra": {"output.weight": (np.zeros((10, 64), np.int8), None)}}, "I8 cannot be dequantised"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_an_inconsistent_model_is_refused_in_one_line(tmp_path: Path, case: str):
    changes, message = BAD_MODELS[case]
    path, _ = small_llama(tmp_path / "x.gguf", **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        open_base(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def raw_gguf(body: bytes = b"", tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + body


def tensor_info(dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(b"t") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


KEY = string(b"k")
BAD_BYTES = {
    "empty": (b"", "ends beyond the file"),
    "four bytes": (b"GGUF", "ends beyond the file"),
    "other magic": (raw_gguf(magic=b"ABCD"), "not a GGUF file"),
    "version 1": (raw_gguf(version=1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "not supported"),
    "2^60 tensors": (raw_gguf(tensors=1 << 60), "ends beyond the file"),
    "2^60 keys": (raw_gguf(keys=1 << 60), "ends beyond the file"),
    "key of 2^60 bytes": (raw_gguf(string(b"k", 1 << 60) + b"\0" * 20, keys=1), "ends beyond the file"),
    "array of 2^60 numbers": (raw_gguf(KEY + struct.pack("<IIQ", 9, 4, 1 << 60), keys=1), "ends beyond the file"),
    "array of 2^60 strings": (raw_gguf(KEY + struct.pack("<IIQ", 9, 8, 1 << 60), keys=1), "ends beyond the file"),
    "array of arrays": (raw_gguf(KEY + struct.pack("<IIQ", 9, 9, 1), keys=1), "array of unsupported type 9"),
    "unknown value type": (raw_gguf(KEY + struct.pack("<IQ", 77, 0), keys=1), "unknown type 77"),
    "a key twice": (raw_gguf((KEY + struct.pack("<IB", 0, 1)) * 2, keys=2), "occurs twice"),
    "2^60 elements": (raw_gguf(tensor_info((1 << 60,)), tensors=1), "file has .* download it again"),
    "no rows of 2^62 numbers": (raw_gguf(tensor_info((1 << 62, 0)) + bytes(64), tensors=1), "which no memory holds"),
    "many dimensions": (raw_gguf(tensor_info((1,) * 9), tensors=1), "9 dimensions"),
    "unknown ggml type": (raw_gguf(tensor_info((32,), kind=999), tensors=1), "ggml type 999"),
    "half a block": (raw_gguf(tensor_info((16,), kind=8), tensors=1), "whole blocks"),
    "offset beyond the file": (raw_gguf(tensor_info((1,), offset=1 << 50), tensors=1), "download it again"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bad_bytes_are_refused_in_one_line(tmp_path: Path, case: str):
    content, message = BAD_BYTES[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_base(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_truncated_model_is_refused(tmp_path: Path):
    path, _ = small_llama(tmp_path / "x.gguf", tokens=TOKENS)
    content = path.read_bytes()
    for keep in (len(content) - 1, len(content) // 2, 600, 100):
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match="download it again"):
            open_base(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_refused_or_read(tmp_path_factory, position: int, patch: bytes):
    folder = tmp_path_factory.mktemp("fuzz")
    path, _ = small_llama(folder / "x.gguf", tokens=TOKENS)
    content = bytearray(path.read_bytes())
    content[position : position + len(patch)] = patch
    path.write_bytes(content)
    try:
        base = open_base(path)
        for name in base.modules:
            base.weight(name)
        base.vocabulary()
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_without_the_gguf_package_the_extra_is_named(tmp_path: Path, monkeypatch):
    path, _ = small_llama(tmp_path / "x.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf.quants", None)
    with pytest.raises(CheckpointError, match=r"pip install 'jcrosslora\[gguf\]'"):
        open_base(path)


REAL = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": ("llama", (30, 576, 1536, 9, 3, 64, 49152)),
    "gemma-3-270m-q4_k_m.gguf": ("gemma3_text", (18, 640, 2048, 4, 1, 256, 262144)),
}


@pytest.mark.full
@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_a_real_gguf_model_is_read(name: str):
    base = open_base(real_model(name))
    family, dims = REAL[name]
    assert base.family.name == family
    d = base.dims
    assert (d.layers, d.hidden, d.intermediate, d.heads, d.kv_heads, d.head_dim, d.vocab) == dims
    for role, module in (("q", "self_attn.q_proj"), ("down", "mlp.down_proj")):
        weight = base.weight(f"model.layers.0.{module}")
        assert np.isfinite(weight).all(), role
    tokens = base.vocabulary().tokens
    assert tokens is not None
    assert {b" the", b"A", b" and"} <= set(tokens)
    assert max(tokens.values()) < d.vocab


@pytest.mark.full
@pytest.mark.real
def test_two_real_vocabularies_share_many_tokens():
    smol, gemma = (open_base(real_model(name)).vocabulary().tokens for name in REAL)
    assert smol is not None
    assert gemma is not None
    assert len(set(smol) & set(gemma)) > 20_000
