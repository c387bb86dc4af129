"""Valid files of every supported kind, ways to damage them, and a reader for each that reads all of it.

`READERS` is the one list; the quick test and tools/fuzz_readers.py go through it.
"""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod
from pathlib import Path
from random import Random
from struct import calcsize, pack
from typing import Any

import httpx
import numpy as np
from adapter_folders import Q, V, adapter_of, base_of, matrix, write_folder
from adapter_folders import tensors as lora_tensors
from checkpoint_files import write_llama, write_sharded_llama
from gguf_files import small_llama
from mutations import NUMBERS, TEXTS, mutated_bytes, mutated_json
from probe_bases import write_base
from quantised_files import CASES, write_quantised
from safetensors.numpy import save
from tiny_bases import write_tokenizer

from jcrosslora import ServedModel
from jcrosslora.adapter import check_engines, load_adapter, save_adapter
from jcrosslora.adapter.other_changes import token_tensors
from jcrosslora.architectures.blocks import EMBEDDING
from jcrosslora.checkpoint import DTYPES, BaseModel, SafetensorsFile, load_tokenizer, open_base
from jcrosslora.checkpoint.vocabulary import Vocabulary
from jcrosslora.decoder import settings_of
from jcrosslora.distill.sources.client import Answers, Client
from jcrosslora.distill.sources.connection import Connection
from jcrosslora.distill.sources.predictions import TokenNames, divergence
from jcrosslora.distill.sources.replies import find_dialect

Files = Mapping[str, bytes]
INDEX = "model.safetensors.index.json"
ONE_OF_EACH = ("nf4, double", "int8 rows", "gptq 3 bits", "gptq, act order", "gptq, no list", "awq")
ONE_OF_EACH += ("packed int4, zero points", "int8, zero points", "fp8 blocks")


def files_of(write: Callable[[Path], object]) -> dict[str, bytes]:
    """Return the files that `write` puts into a folder or a folder inside it."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@cache
def llama() -> Files:
    return files_of(lambda folder: (write_llama(folder), write_tokenizer(folder, 10)))


@cache
def tokenized() -> Files:
    sizes = {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate": 8}
    return files_of(lambda folder: write_base(folder, 8, bos=True, **sizes))


@cache
def sharded() -> Files:
    return files_of(write_sharded_llama)


@cache
def packed() -> Files:
    texts = ["<s>", "a", "b", "\u0120a", "<0x41>", "é", "ab", "c", "d", "e"]
    options = {"tokens": ("gpt2", texts, [3, 1, 1, 1, 6, 1, 1, 1, 1, 4]), "metadata": {"rope.scaling.type": "none"}}
    return files_of(lambda folder: small_llama(folder / "x.gguf", **options))


@cache
def adapter() -> Files:
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3.5}, "use_rslora": True}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    return files_of(lambda folder: write_folder(folder, config | patterns))


@cache
def mlx_adapter() -> Files:
    """Make an adapter with everything it may hold beside factors of linear layers."""
    tensors = {f"{V}.lora_a": matrix(6, 2), f"{V}.lora_b": matrix(2, 5), f"{Q}.lora_a": matrix(6, 2)}
    tensors |= {f"{Q}.lora_b": matrix(2, 5), "model.embed_tokens.lora_a": matrix(9, 2)}
    tensors |= {"model.embed_tokens.lora_b": matrix(2, 6)}
    config = {"fine_tune_type": "lora", "num_layers": 2, "model": "org/name"}
    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, "alpha": 16, "keys": ["self_attn.q_proj"]}
    text = json.dumps(config | {"lora_parameters": parameters}).encode()
    return {"adapter_config.json": text, "adapters.safetensors": save(tensors)}


@cache
def gguf_adapter() -> Files:
    adapter = adapter_of({Q: 2, V: 3}, width=8, rows=8)
    info = replace(adapter.info, invocation=(3, 5))
    base = replace(base_of([Q, V]), heads=(2, 1))
    return files_of(lambda folder: save_adapter(replace(adapter, info=info), folder / "a", base=base, profile="gguf"))


@cache
def adapter_with_tokens() -> tuple[Files, ...]:
    """Make a tied base and an adapter with LoRA of embedding and head, whole matrices, and trained tokens."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    embedding, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    lora = {f"{embedding}.lora_embedding_A": matrix(2, 10), f"{embedding}.lora_embedding_B": matrix(16, 2)}
    lora |= {f"{head}.lora_A.weight": matrix(2, 16), f"{head}.lora_B.weight": matrix(10, 2)}
    whole = {f"{name}.weight": matrix(10, 16, seed=place) for place, name in enumerate((embedding, head), 1)}
    listed = {"embed_tokens": [7, 2], "lm_head": [1]}
    delta = "token_adapter.trainable_tokens_delta"
    single = {f"{embedding}.{delta}": matrix(2, 16), f"{head}.{delta}": matrix(1, 16)}
    cases = ((lora, {}), (whole, {}), (single, {"trainable_token_indices": listed}))

    def write(folder: Path, more: dict, said: dict) -> None:
        write_llama(folder)
        write_folder(folder, config | said, lora_tensors() | more)

    return tuple(files_of(lambda folder, case=case: write(folder, *case)) for case in cases)


@cache
def quantised() -> tuple[Files, ...]:
    return tuple(
        files_of(lambda folder, case=case: write_quantised(folder, case, hidden=64, intermediate=64, vocab=32))
        for case in map(CASES.__getitem__, ONE_OF_EACH)
    )


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """Split a file into its header and tensor bytes."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def damaged_safetensors(rng: Random, data: bytes) -> bytes:
    """Damage the header as a tree or as bytes, or the tensor bytes; or replace the whole file."""
    header, tensors = split_safetensors(data)
    kind = rng.randrange(5)
    if kind == 4:
        return made_safetensors(rng)
    if kind == 0:
        end = len(data) - len(tensors)
        return mutated_bytes(rng, data[:end]) + tensors
    if kind == 1:
        return data[: len(data) - len(tensors)] + mutated_bytes(rng, tensors)
    text = mutated_json(rng, header)
    return len(text).to_bytes(8, "little") + text + tensors


def made_safetensors(rng: Random) -> bytes:
    """Make a header of tensors of arbitrary sizes, with matching offsets where possible."""
    size = rng.choice((0, 8, 64, 4096))
    header: dict[str, object] = {}
    for name in range(rng.randint(1, 4)):
        dtype = rng.choice((*DTYPES, "F4", "I128"))
        shape = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 40, 70)))]
        if rng.random() < 0.5:
            shape = [rng.choice((0, 1, 2, 1 << 62)) for _ in shape]
        start, length = rng.randrange(size + 1), prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else 1)
        end = start + (length if length <= size else rng.choice(NUMBERS))
        header[f"t{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def damaged_mlx(rng: Random) -> Files:
    """Damage one of the two files of an MLX adapter."""
    files = mlx_adapter()
    if rng.random() < 0.5:
        return {**files, "adapter_config.json": mutated_json(rng, json.loads(files["adapter_config.json"]))}
    return {**files, "adapters.safetensors": damaged_safetensors(rng, files["adapters.safetensors"])}


def made_gguf(rng: Random) -> bytes:
    """Make a header of keys and tensors of arbitrary types and sizes, whose counts may be wrong."""

    def number(code: str) -> bytes:
        return pack(f"<{code}", rng.choice(NUMBERS) % (1 << 8 * calcsize(code)))

    def text() -> bytes:
        raw = rng.choice(TEXTS).encode("utf-8", "surrogatepass")[:100]
        return (pack("<Q", len(raw)) if rng.random() < 0.9 else number("Q")) + raw

    def value(kind: int, depth: int = 0) -> bytes:
        if kind == 8:
            return text()
        if kind == 9:
            inner = rng.choice((0, 4, 6, 8, 9 if depth < 20 else 4, 12, 13))
            count = rng.randrange(4)
            stated = count if rng.random() < 0.8 else rng.choice(NUMBERS)
            return pack("<IQ", inner, stated) + b"".join(value(inner, depth + 1) for _ in range(count))
        return rng.randbytes({0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4))

    keys, tensors = rng.randrange(4), rng.randrange(3)
    head = b"GGUF" + pack("<I", rng.choice((2, 3, 3, 3, 1, 1 << 24)))
    head += (pack("<Q", tensors) if rng.random() < 0.8 else number("Q")) + pack("<Q", keys)
    for place in range(keys):
        name = rng.choice((b"general.architecture", b"general.alignment", b"llama.block_count", b"k%d" % place))
        kind = rng.choice((*range(13), 77, 9, 8, 4))
        content = pack("<Q", 5) + b"llama" if name.endswith(b"architecture") and kind == 8 else value(kind)
        head += pack("<Q", len(name)) + name + pack("<I", kind) + content
    for place in range(tensors):
        name = rng.choice((b"token_embd.weight", b"blk.0.attn_q.weight", b"t%d" % place))
        dims = rng.randint(0, 5)
        head += pack("<Q", len(name)) + name + pack("<I", dims) + b"".join(number("Q") for _ in range(dims))
        head += pack("<IQ", rng.choice((0, 1, 2, 8, 12, 30, 999)), rng.choice((0, 32, 7, *NUMBERS)))
    return head + bytes(rng.choice((0, 31, 64, 4096)))


def damaged_gguf_adapter(rng: Random) -> Files:
    """Damage an adapter of llama.cpp, mostly its header, which is three quarters of the file."""
    return {
        "adapter.gguf": made_gguf(rng) if rng.random() < 0.1 else mutated_bytes(rng, gguf_adapter()["adapter.gguf"])
    }


@cache
def replies() -> tuple[Files, ...]:
    """Make answers of vLLM, of SGLang and of llama.cpp: their models, and three tokens with one behind them."""
    texts, values = ("a", "b", "ab", "c"), (-0.4, -1.5, -3.0, -9999.0)
    found = []
    for kind in ("vllm", "sglang", "llamacpp"):
        cards = [{"id": "base", "owned_by": kind}, {"id": "lora", "owned_by": kind, "parent": "base", "aliases": ["x"]}]
        files: dict[str, Any] = {"models": {"object": "list", "data": cards}}
        if kind == "llamacpp":
            files["lora-adapters"] = [{"id": 0, "path": "/x/lora.gguf", "scale": 1.0}, {"id": 1, "path": "other.gguf"}]
            tops = [
                {"id": n, "token": text, "bytes": [97], "logprob": value}
                for n, (text, value) in enumerate(zip(texts, values, strict=True))
            ]
            text, told = "b", {"content": [{**tops[1], "top_logprobs": tops}]}
        else:
            names = [f"token_id:{n}" for n in range(4)] if kind == "vllm" else texts
            likely = dict(zip(names, values, strict=True))
            text, told = "abca", {"tokens": [*names[:3], names[0]], "token_logprobs": [None, -1.5, -3.0, -0.4]}
            told["top_logprobs"] = [None, likely, likely, likely]
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": told}
        files["completions"] = {"id": "x", "choices": [choice], "usage": {"total_tokens": 4}}
        found.append({f"{name}.json": json.dumps(value).encode() for name, value in files.items()})
    return tuple(found)


def damaged_reply(rng: Random) -> Files:
    """Damage one of a server's answers, mostly the completion."""
    files = rng.choice(replies())
    name = "completions.json" if rng.random() < 0.8 else rng.choice(sorted(files))
    return {**files, name: mutated_json(rng, json.loads(files[name]))}


def stored_reply(folder: Path, request: httpx.Request) -> httpx.Response:
    name = request.url.path.rpartition("/")[2]
    return httpx.Response(200, content=(folder / f"{name}.json").read_bytes())


def read_replies(folder: Path) -> None:
    """Ask for the models, read a text of three tokens, write behind it, and check the tokenizer."""
    served = ServedModel("http://host/v1", "lora", folder)
    client = Client(served, wait=lambda seconds: None)
    client._http = httpx.AsyncClient(transport=httpx.MockTransport(partial(stored_reply, folder)))
    dialect = find_dialect(client, served)
    names = TokenNames(Vocabulary({b"a": 0, b"b": 1, b"ab": 2, b"c": 3}))
    connection = Connection(client, dialect, names, (1,), 3, Answers(None, None))
    ids = np.arange(3, dtype=np.int32)
    tops = connection.predict(dialect.adapted, ids, [0, 1, 2] if dialect.kind != "llamacpp" else [2])
    for top in tops:
        assert top.ids.dtype == np.int32
        assert np.isfinite([divergence(top, tops[0]), divergence(tops[0], top), top.rest, top.log_prob(1)]).all()
    connection.write(dialect.base, ids, 2, 0.0, 0)
    connection.check_tokenizer(dialect.base, ids, lambda tokens: "".join("abc"[token % 3] for token in tokens))


def with_json(name: str, files: Callable[[], Files]) -> Callable[[Random], Files]:
    """Damage the JSON file `name`."""
    return lambda rng: {**files(), name: mutated_json(rng, json.loads(files()[name]))}


def damaged_quantised(rng: Random) -> Files:
    """Damage the settings or the parts of a weight in one of the formats."""
    files = rng.choice(quantised())
    config = json.loads(files["config.json"])
    if "quantization_config" in config and rng.random() < 0.4:
        text = mutated_json(rng, config["quantization_config"])
        del config["quantization_config"]
        return {**files, "config.json": json.dumps(config).encode()[:-1] + b', "quantization_config": ' + text + b"}"}
    return {**files, "model.safetensors": damaged_safetensors(rng, files["model.safetensors"])}


def damaged_gguf(rng: Random) -> Files:
    """Damage the header (in 10 % of cases any byte), or replace the whole file."""
    if rng.random() < 0.3:
        return {"x.gguf": made_gguf(rng)}
    data = packed()["x.gguf"]
    head = data.index(b"blk.1.") + 1500 if rng.random() < 0.9 else len(data)
    return {"x.gguf": mutated_bytes(rng, data[:head]) + data[head:]}


def read_container(folder: Path) -> None:
    """Read every tensor of a safetensors file."""
    file = SafetensorsFile(folder / "model.safetensors")
    for name, entry in file.entries.items():
        assert file.array(name).shape == entry.shape


def read_base(base: BaseModel) -> None:
    """Read every weight, some rows, the gains, the vocabulary and the decoder settings."""
    base.store.names()
    for name, module in base.modules.items():
        assert base.weight(name).shape == module.shape
        assert base.residual_gain(name).shape == (base.dims.hidden,)
    assert base.rows(EMBEDDING, np.arange(2)).shape == (2, base.dims.hidden)
    base.vocabulary()
    settings_of(base)


def read_tokenizer(folder: Path) -> None:
    """Read the vocabulary, and a text to tokens and back."""
    base = open_base(folder)
    base.vocabulary()
    tokenizer = load_tokenizer(base)
    tokenizer.decode(tokenizer.encode("Water boils, said Zürich.").ids)


def damaged_tokens(rng: Random) -> Files:
    """Damage the configuration or the weights of an adapter that changes embedding and head."""
    files = rng.choice(adapter_with_tokens())
    if rng.random() < 0.5:
        return {**files, "adapter_config.json": mutated_json(rng, json.loads(files["adapter_config.json"]))}
    weights = "adapter_model.safetensors"
    return {**files, weights: damaged_safetensors(rng, files[weights])}


def read_tokens(folder: Path) -> None:
    """Read the changes of embedding and head against the base, and write the adapter again."""
    adapter = load_adapter(folder, open_base(folder))
    for update in adapter.tokens:
        assert all(np.isfinite(update.changed(np.zeros((len(update.ids), 16)), part)).all() for part in update.parts())
    token_tensors(adapter.tokens, "float32")


def read_adapter(folder: Path) -> None:
    """Check the engines that accept it, and read its factors."""
    check_engines(folder, "llama")
    for factors in load_adapter(folder).modules.values():
        assert np.isfinite(factors.a).all()


@dataclass(frozen=True)
class Reader:
    """A kind of file: how to write and damage it, and how to read the result.

    Attributes:
        damage: makes the files of one case.
        read: reads everything that a user may read; raises an error of this package or none.
    """

    damage: Callable[[Random], Files]
    read: Callable[[Path], object]


READERS: Mapping[str, Reader] = {
    "safetensors": Reader(
        lambda rng: {"model.safetensors": damaged_safetensors(rng, llama()["model.safetensors"])}, read_container
    ),
    "config.json": Reader(with_json("config.json", llama), lambda folder: read_base(open_base(folder))),
    "index": Reader(with_json(INDEX, sharded), lambda folder: read_base(open_base(folder))),
    "tokenizer.json": Reader(with_json("tokenizer.json", tokenized), read_tokenizer),
    "quantised weights": Reader(damaged_quantised, lambda folder: read_base(open_base(folder))),
    "GGUF": Reader(damaged_gguf, lambda folder: read_base(open_base(folder / "x.gguf"))),
    "adapter config": Reader(with_json("adapter_config.json", adapter), read_adapter),
    "adapter weights": Reader(
        lambda rng: {
            **adapter(),
            "adapter_model.safetensors": damaged_safetensors(rng, adapter()["adapter_model.safetensors"]),
        },
        read_adapter,
    ),
    "MLX adapter": Reader(damaged_mlx, read_adapter),
    "GGUF adapter": Reader(damaged_gguf_adapter, read_adapter),
    "adapter of embedding and head": Reader(damaged_tokens, read_tokens),
    "answers of servers": Reader(damaged_reply, read_replies),
}
