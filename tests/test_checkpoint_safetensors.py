"""The safetensors reader and the folder index, on files written byte by byte."""

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import llama_tensors, write_config, write_llama, write_safetensors, write_sharded_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from jcrosslora.architectures import EMBEDDING
from jcrosslora.checkpoint import DTYPES, SafetensorsFile, open_base
from jcrosslora.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("padding", [0, 3])
def test_a_file_of_mixed_dtypes_is_read(tmp_path: Path, padding: int):
    rng = np.random.default_rng(0)
    arrays = {}
    for dtype, numpy_dtype in DTYPES.items():
        raw = rng.integers(0, 2, (3, 2)) if dtype == "BOOL" else rng.integers(0, 5, (3, 2))
        arrays[dtype] = (dtype, raw.astype(numpy_dtype))
    file = SafetensorsFile(write_safetensors(tmp_path / "x.safetensors", arrays, padding))
    for dtype, (_, array) in arrays.items():
        read = file.array(dtype)
        assert read.dtype == DTYPES[dtype]
        assert np.array_equal(read.view(np.uint8), array.view(np.uint8))
        assert not read.flags.writeable


def test_files_of_the_safetensors_package_are_read(tmp_path: Path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.array(3.5), "c": np.ones((0, 4))}
    tensors["d"] = np.arange(4).astype(ml_dtypes.bfloat16)
    numpy_io.save_file(tensors, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.entries) == set(tensors)
    for name, array in tensors.items():
        assert np.array_equal(file.array(name), array)
        assert file.array(name).shape == array.shape


def test_an_unknown_dtype_is_refused_only_when_it_is_read(tmp_path: Path):
    good = np.ones(2, np.float32)
    tensors = {"odd": ("F4", np.zeros(3, np.uint8)), "good": ("F32", good)}
    file = SafetensorsFile(write_safetensors(tmp_path / "x.safetensors", tensors))
    assert np.array_equal(file.array("good"), good)
    with pytest.raises(CheckpointError, match="'F4'"):
        file.array("odd")


def header_file(path: Path, header: bytes, length: int | None = None, data: bytes = b"\0" * 8) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> bytes:
    return json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BAD_HEADERS = {
    "empty": (b"", 0, b"", "not valid JSON|too few|empty"),
    "length 2^60": (b"{}", 1 << 60, b"", "header length"),
    "length beyond the file": (b"{}", 500, b"", "download it again"),
    "not JSON": (b"{nope", None, b"", "not valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", None, b"", "not valid JSON"),
    "a list": (b"[]", None, b"", "not a JSON object"),
    "deep nesting": (b'{"a":' * 200_000, None, b"", "not valid JSON"),
    "entry is a number": (b'{"t": 3}', None, b"", "malformed"),
    "no dtype": (b'{"t": {"shape": [1], "data_offsets": [0, 4]}}', None, b"\0" * 8, "malformed"),
    "negative shape": (entry(shape=(-2,)), None, b"\0" * 8, "malformed"),
    "float shape": (entry(shape=(2.0,)), None, b"\0" * 8, "malformed"),
    "boolean shape": (entry(shape=(True, 2)), None, b"\0" * 8, "malformed"),
    "three offsets": (entry(offsets=(0, 4, 8)), None, b"\0" * 8, "malformed"),
    "2^60 elements": (entry(shape=(1 << 60,)), None, b"\0" * 8, "needs"),
    "offsets too short": (entry(offsets=(0, 4)), None, b"\0" * 8, "needs 8 bytes"),
    "offsets reversed": (entry(offsets=(8, 0)), None, b"\0" * 8, "needs 8 bytes"),
    "no elements, and 2^63 columns": (entry(shape=(0, 1 << 63), offsets=(0, 0)), None, b"", "no memory holds"),
    "70 dimensions": (entry(shape=(1,) * 70, offsets=(0, 4)), None, b"\0" * 8, "70 dimensions"),
    "a tensor twice": (b'{"t": 1, "t": 2}', None, b"", "names a key twice"),
    "shared bytes": (
        json.dumps(
            {name: {"dtype": "U8", "shape": [3], "data_offsets": [at, at + 3]} for at, name in enumerate("abc")}
        ).encode(),
        None,
        b"\0" * 8,
        "'a' and 'b' share bytes",
    ),
    "truncated": (entry(shape=(20,), offsets=(0, 80)), None, b"\0" * 8, "download it again"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_in_one_line(tmp_path: Path, case: str):
    header, length, data, message = BAD_HEADERS[case]
    path = header_file(tmp_path / "x.safetensors", header, length, data)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in one_line(error)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8), st.integers(0, 100))
def test_a_damaged_file_is_refused_or_read(tmp_path_factory, position: int, patch: bytes, cut: int):
    folder = tmp_path_factory.mktemp("fuzz")
    tensors = {"a": ("F32", np.ones((2, 3), np.float32)), "b": ("BF16", np.ones(4, ml_dtypes.bfloat16))}
    raw = bytearray(write_safetensors(folder / "x.safetensors", tensors).read_bytes())
    raw[position : position + len(patch)] = patch
    (folder / "y.safetensors").write_bytes(raw[: len(raw) - cut] if cut < 50 else raw)
    try:
        file = SafetensorsFile(folder / "y.safetensors")
        for name in file.entries:
            file.array(name).astype(np.float32)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_single_and_sharded_files_hold_the_same_tensors_with_different_digests(tmp_path: Path):
    single, sharded = open_base(write_llama(tmp_path / "a")), open_base(write_sharded_llama(tmp_path / "b"))
    assert set(single.store.names()) == set(sharded.store.names())
    for name, array in llama_tensors().items():
        assert np.array_equal(single.tensor(name), array)
        assert np.array_equal(sharded.tensor(name), array)
    assert single.digest() != sharded.digest()
    assert single.digest() == open_base(write_llama(tmp_path / "c")).digest()
    assert len(single.digest()) == len("sha256:") + 64


def test_a_released_map_is_read_again(tmp_path: Path):
    base = open_base(write_llama(tmp_path))
    view = base.weight("model.layers.1.mlp.up_proj")
    before = view.copy()
    base.release()
    assert np.array_equal(view, before)


def test_files_that_the_index_does_not_name_are_never_opened(tmp_path: Path):
    folder = write_sharded_llama(tmp_path)
    (folder / "consolidated.safetensors").write_bytes(b"not a safetensors file")
    (folder / "model.safetensors").write_bytes(b"nor this one")
    assert open_base(folder).dims.layers == 2


def test_rows_of_the_embedding_are_read_by_id(tmp_path: Path):
    base, table = open_base(write_llama(tmp_path)), llama_tensors()["model.embed_tokens.weight"]
    ids = np.array([7, 0, 7])
    assert np.array_equal(base.rows(EMBEDDING, ids), table[ids])
    assert np.array_equal(base.rows("lm_head.weight", ids), table[ids])
    for wrong in ([10], [-1]):
        with pytest.raises(CheckpointError, match="does not have"):
            base.rows(EMBEDDING, np.array(wrong))
    with pytest.raises(CheckpointError, match="does not have"):
        base.rows("model.norm.weight", ids)


def test_a_base_is_named_by_argument_hub_cache_or_path(tmp_path: Path):
    folder = write_llama(tmp_path / "plain")
    assert open_base(folder).name == str(folder)
    assert open_base(folder, name="me/mine").name == "me/mine"
    # transformers writes `_name_or_path` as the model that training started from.
    assert open_base(write_llama(tmp_path / "own", _name_or_path="org/parent")).name == str(tmp_path / "own")
    cached = open_base(write_llama(tmp_path / "models--org--name" / "snapshots" / "abc123"))
    assert (cached.name, cached.revision) == ("org/name", "abc123")


def test_local_files_have_no_revision_but_their_own(tmp_path: Path):
    plain = write_llama(tmp_path / "plain")
    cached = write_llama(tmp_path / "models--org--name" / "snapshots" / "abc123")
    assert open_base(cached, revision="abc123").revision == "abc123"
    for folder, known in ((plain, "no revision is known"), (cached, "of revision abc123")):
        with pytest.raises(CheckpointError, match=f"{known}.*; expected revision 'v2'"):
            open_base(folder, revision="v2")


@pytest.mark.parametrize("ref", ["~no-such-user/model", "m" * 5000, "org/" + "m" * 5000])
def test_an_impossible_path_gives_a_one_line_error(ref: str):
    with pytest.raises(CheckpointError, match="not a path"):
        open_base(ref)


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-10])


def only_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def only_gguf(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "x.gguf").write_bytes(b"GGUF")


def move(name: str, shard):
    return lambda folder: edit_index(folder, lambda index: index["weight_map"].update({name: shard}))


NORM = "model.norm.weight"
BAD_FOLDERS = {
    "no config": (lambda f: drop(f, "config.json"), "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object was expected"),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xff"), "not valid JSON"),
    "an adapter": (lambda f: (drop(f, "config.json"), (f / "adapter_config.json").write_text("{}")), "is an adapter"),
    "missing shard": (lambda f: drop(f, SECOND), "cannot be read"),
    "truncated shard": (truncate, r"file has \d+ bytes, header says \d+ or more.*download it again"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("nope"), "not valid JSON"),
    "index without map": (lambda f: edit_index(f, lambda i: i.pop("weight_map")), "weight_map"),
    "index lacks a tensor": (lambda f: edit_index(f, lambda i: i["weight_map"].pop(NORM)), f"{NORM} is missing"),
    "index names the wrong shard": (move(NORM, SECOND), "index places tensor"),
    "index leaves the folder": (move(NORM, "../x.safetensors"), "not a .* file of the folder"),
    "index names an absolute path": (move(NORM, "/etc/x.safetensors"), "not a .* file of the folder"),
    "index names a pickle": (move(NORM, "x.bin"), "not a .* file of the folder"),
    "index names a number": (move(NORM, 3), "not a .* file of the folder"),
    "only pickle": (only_pickle, "pickle.*save_pretrained"),
    "only gguf": (only_gguf, r"x\.gguf"),
    "unknown model type": (lambda f: write_config(f, model_type="mamba"), "'mamba' is not supported; supported: llama"),
    "no model type": (lambda f: write_config(f, model_type=...), "model_type None"),
    "model type is a list": (lambda f: write_config(f, model_type=["llama"]), "not supported"),
    "other architecture": (lambda f: write_config(f, architectures=["LlamaForTokenClassification"]), "architectures"),
    "unknown key": (lambda f: write_config(f, residual_multiplier=0.2), "'residual_multiplier'=0.2 is not known"),
    "wrong width": (lambda f: write_config(f, hidden_size=32), r"shape \[10, 16\], config says \[10, 32\].* more"),
    "more layers": (lambda f: write_config(f, num_hidden_layers=3), "config says 3 layers, the weights hold 2"),
    "fewer layers": (lambda f: write_config(f, num_hidden_layers=1), "config says 1 layers, the weights hold 2"),
    "2^30 layers": (lambda f: write_config(f, num_hidden_layers=1 << 30), "the weights hold 2"),
    "2^60 layers": (lambda f: write_config(f, num_hidden_layers=1 << 60), "expected a positive integer"),
    "size is text": (lambda f: write_config(f, hidden_size="16"), "'hidden_size' is '16'"),
    "size is missing": (lambda f: write_config(f, vocab_size=...), "'vocab_size' is None"),
    "no heads": (lambda f: write_config(f, num_attention_heads=0), "'num_attention_heads' is 0"),
    "heads not grouped": (lambda f: write_config(f, num_key_value_heads=3), "not a multiple"),
    "untied without head": (lambda f: write_config(f, tie_word_embeddings=False), "lm_head.weight is missing"),
    "biases promised": (lambda f: write_config(f, attention_bias=True), "q_proj.bias is missing"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused_in_one_line(tmp_path: Path, case: str):
    damage, message = BAD_FOLDERS[case]
    folder = write_sharded_llama(tmp_path / "model")
    open_base(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        open_base(folder)
    assert str(folder) in one_line(error)


def test_all_shape_problems_are_counted(tmp_path: Path):
    tensors = llama_tensors()
    for name in list(tensors)[:6]:
        tensors[name] = tensors[name][..., :-1]
    with pytest.raises(CheckpointError, match=r"and 3 more: download it again$") as error:
        open_base(write_llama(tmp_path, tensors))
    assert next(iter(tensors)) in one_line(error)


def test_integer_weights_are_refused(tmp_path: Path):
    folder = write_llama(tmp_path)
    tensors = {name: ("F32", array) for name, array in llama_tensors().items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = ("I8", np.zeros((24, 16), np.int8))
    write_safetensors(folder / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="has dtype I8, expected a float dtype"):
        open_base(folder)


@pytest.mark.parametrize(
    "ref", ["/no/such/folder", "./nothing", "gpt2", "a/b/c", "", "a b/c", "nothing.gguf", "x/y.gguf"]
)
def test_a_name_that_is_neither_path_nor_hub_id_is_refused(ref: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(CheckpointError, match=r"no such folder or file|no config\.json") as error:
        open_base(ref)
    one_line(error)


def test_a_single_weight_file_is_refused(tmp_path: Path):
    folder = write_llama(tmp_path)
    with pytest.raises(CheckpointError, match=r"the folder that holds config\.json"):
        open_base(folder / "model.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_refused(tmp_path: Path):
    folder = write_llama(tmp_path)
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        open_base(folder)
