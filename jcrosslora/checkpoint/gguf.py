"""Open a GGUF model: its configuration, and its tensors by Hugging Face name, dequantised when read."""

import importlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

from jcrosslora.architectures import ROLE_PATHS, Architecture
from jcrosslora.architectures.blocks import EMBEDDING
from jcrosslora.checkpoint.config import ModelConfig, check_config, read_dims
from jcrosslora.checkpoint.gguf_config import translate
from jcrosslora.checkpoint.gguf_header import GGUFHeader, Metadata, TensorInfo, model_name, read_header
from jcrosslora.checkpoint.gguf_tensors import Source, block_names, find_sources, hf_name, permutes_heads
from jcrosslora.checkpoint.layout import layer_of
from jcrosslora.checkpoint.safetensors import DTYPES
from jcrosslora.checkpoint.store import MappedFile, TensorStore, errors_of
from jcrosslora.checkpoint.vocabulary import Vocabulary, gguf_vocabulary
from jcrosslora.errors import CheckpointError

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_ROWS_AT_ONCE = 4096
_ROW_BYTES = 4096  # rows of block types are joined up to this size, which halves the time to dequantise
# Types that numpy can hold; all others are dequantised to float32.
_NATIVE = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


def open_gguf(path: Path) -> "tuple[ModelConfig, GGUFStore, str | None]":
    """Return the configuration and the tensors of a GGUF model, and its name in the metadata.

    Raises CheckpointError if the gguf package is missing, or the file is corrupt, truncated or not supported.
    """
    gguf, file, header = open_header(path)
    meta = Metadata(header.metadata, file)
    names = _hf_names(header, meta)
    rope = {name: header.tensors[name] for name in _ROPE_TENSORS if name in header.tensors}
    floats = {name: to_float(stored_rows(file, info, gguf), info.kind, gguf, path) for name, info in rope.items()}
    factors = {name: array.astype(np.float32).reshape(-1) for name, array in floats.items()}
    config = check_config(translate(meta, _facts(file, header, names), factors), path)
    if permutes_heads(meta.arch):
        _check_heads(config, file, header)
    stated = _stated(config, file, header)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    model = Architecture(config.family, config.values, read_dims(config, path))
    with errors_of(path):
        unknown = _other_module(names, model)
        sources = find_sources(names, shapes, model)
    if unknown is not None:
        _refuse_unknown(unknown, meta)
    return config, GGUFStore(file, header, gguf, sources, stated), model_name(header.metadata)


def open_header(path: Path) -> tuple[ModuleType, MappedFile, GGUFHeader]:
    """Return the gguf package, the mapped file and its header; the file may be a model or an adapter.

    Raises CheckpointError if the package is missing, or the file is corrupt, truncated or in an unsupported
    quantisation.
    """
    try:
        importlib.import_module("gguf.quants")
        gguf = importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise CheckpointError(f"{path}: reading GGUF needs the gguf package: pip install 'jcrosslora[gguf]'") from error
    file = MappedFile(path)
    header = read_header(file, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    for kind in {info.kind for info in header.tensors.values()}:  # refuse what cannot be dequantised, by zeros
        to_float(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind, gguf, path)
    return gguf, file, header


class GGUFStore(TensorStore):
    """The tensors of a GGUF file by their Hugging Face names, with the changes of llama.cpp's converter undone.

    Args:
        sources: where each tensor is, by Hugging Face name.
        stated: float32 tensors that the file states in its metadata, by Hugging Face name.
    """

    def __init__(
        self,
        file: MappedFile,
        header: GGUFHeader,
        gguf: ModuleType,
        sources: Mapping[str, Source],
        stated: Mapping[str, np.ndarray],
    ):
        self._file, self._header, self._gguf = file, header, gguf
        self._sources, self._stated = sources, stated
        self.files = (file.path,)

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            self._file.refuse(f"the file has no tensor for {name!r}")
        return self._sources[name]

    def names(self) -> list[str]:
        """Hugging Face names in file order, tensors from the metadata last."""
        return [*self._sources, *self._stated]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stated[name].shape if name in self._stated else self._source(name).shape

    def dtype(self, name: str) -> str:
        """The ggml type, e.g. "Q4_K"."""
        if name in self._stated:
            return "F32"
        return self._gguf.GGMLQuantizationType(self._header.tensors[self._source(name).stored[0]].kind).name

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor: a view of a float type, else a float32 or reordered copy."""
        if name in self._stated:
            return self._stated[name]
        source = self._source(name)
        if source.form == "latent":
            keys, values = (self._read(stored, None).astype(np.float32) for stored in source.stored)
            return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(source.shape)
        arrays = [self._read(stored, None) for stored in source.stored]
        array = arrays[0] if len(arrays) == 1 else np.concatenate([one.astype(np.float32) for one in arrays])
        if source.form == "log":
            with np.errstate(divide="ignore", invalid="ignore"):  # Callers check weights for NaN and infinity.
                array = np.log(-array.astype(np.float32).reshape(-1))
        if source.rows is not None:
            array = array[source.rows]
        if source.columns is not None:
            array = array[:, source.columns]
        if source.offset:
            return array.astype(np.float32) - np.float32(source.offset)
        return array.reshape(source.shape)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read and dequantise only these rows of a matrix or of a stack of them, as float32 (n, columns)."""
        if name in self._stated or self._source(name).form is not None:
            return self.tensor(name)[ids].astype(np.float32)
        source = self._source(name)
        places = ids if source.rows is None else source.rows[ids]
        out = np.empty((len(ids), source.shape[-1]), np.float32)
        # In pieces, because dequantising takes several times the memory of its result.
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            piece = slice(start, start + _ROWS_AT_ONCE)
            found = self._rows_of(source, places[piece])
            out[piece] = found if source.columns is None else found[:, source.columns]
        return out

    def _rows_of(self, source: Source, places: np.ndarray) -> np.ndarray:
        if len(source.stored) == 1:
            return self._read(source.stored[0], places)
        out, first = np.empty((len(places), source.shape[-1]), np.float32), 0
        for stored in source.stored:
            count = self._header.tensors[stored].shape[0]
            here = (places >= first) & (places < first + count)
            out[here] = self._read(stored, places[here] - first)
            first += count
        return out

    def _read(self, stored: str, rows: np.ndarray | None) -> np.ndarray:
        info = self._header.tensors[stored]
        array = stored_rows(self._file, info, self._gguf)
        array = array.reshape(-1, array.shape[-1]) if rows is not None and array.ndim > 2 else array
        return to_float(array if rows is None else array[rows], info.kind, self._gguf)

    def vocabulary(self) -> Vocabulary:
        return gguf_vocabulary(self._header.metadata, self.shape(EMBEDDING)[0])

    def release(self) -> None:
        self._file.release()


def stored_rows(file: MappedFile, info: TensorInfo, gguf: ModuleType) -> np.ndarray:
    """Return a tensor as stored: (..., columns) in its dtype, or (..., bytes of a row) for block types."""
    native = _NATIVE.get(gguf.GGMLQuantizationType(info.kind).name)
    if native is not None:
        return file.array(native, info.shape, info.start)
    elements, size = gguf.GGML_QUANT_SIZES[info.kind]
    return file.array(np.uint8, (*info.shape[:-1], info.shape[-1] // elements * size), info.start)


def float_type(kind: int, gguf: ModuleType) -> str:
    """Return the name of the dtype of `to_float` for a ggml type: itself if numpy can hold it, else F32."""
    name = gguf.GGMLQuantizationType(kind).name
    return name if name in _NATIVE else "F32"


def to_float(stored: np.ndarray, kind: int, gguf: ModuleType, path: Path | None = None) -> np.ndarray:
    """Dequantise rows from `stored_rows` to float32; types that numpy can hold are returned unchanged."""
    quant = gguf.GGMLQuantizationType(kind)
    if quant.name in _NATIVE:
        return stored
    if prod(stored.shape) == 0:
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        return np.empty((*stored.shape[:-1], stored.shape[-1] // size * elements), np.float32)
    try:
        # Callers check weights for NaN and infinity.
        with np.errstate(over="ignore", invalid="ignore"):
            return gguf.quants.dequantize(_long_rows(stored), quant).reshape(*stored.shape[:-1], -1)
    except NotImplementedError as error:
        msg = f"{path}: ggml type {quant.name} cannot be dequantised by the gguf package: use another quantisation"
        raise CheckpointError(msg) from error


def _long_rows(stored: np.ndarray) -> np.ndarray:
    """Join rows, so that the 16 that the gguf package takes at a time fill the processor's inner cache."""
    rows = prod(stored.shape[:-1])
    joined = max(1, min(rows, _ROW_BYTES // stored.shape[-1]))
    while rows % joined:
        joined -= 1
    return np.ascontiguousarray(stored).reshape(rows // joined, -1)


def _hf_names(header: GGUFHeader, meta: Metadata) -> dict[str, list[str]]:
    """Return, for each tensor of the model, the file's tensors that hold its rows, in row order."""
    order = {stored: place for place, stored in enumerate(block_names(meta.arch))}
    names: dict[str, list[str]] = {}
    for stored in header.tensors:
        if stored in _ROPE_TENSORS or _predicts_further(stored, meta):
            continue
        name = hf_name(stored, meta.arch)
        if name is None:
            _refuse_unknown(stored, meta)
        names.setdefault(name, []).append(stored)
    return {name: sorted(stored, key=lambda one: order.get(one.split(".", 2)[-1], 0)) for name, stored in names.items()}


def _other_module(names: Mapping[str, list[str]], model: Architecture) -> str | None:
    """Return a tensor of the file for a linear module that this model lacks, None if there is none."""
    if model.dims.layers > len(names):
        return None  # refused for that by `check_tensors`
    others = {path for role, path in ROLE_PATHS.items() if role not in model.role_shapes}
    others -= {ROLE_PATHS[role] for role in model.role_shapes} | model.family.fused.keys()
    found = (stored[0] for name, stored in names.items() if name.split(".", 3)[-1].rpartition(".")[0] in others)
    return next(found, None)


def _refuse_unknown(stored: str, meta: Metadata) -> NoReturn:
    meta.file.refuse(f"tensor {stored!r} is not known for architecture {meta.arch!r}: it may change the model")


def _predicts_further(stored: str, meta: Metadata) -> bool:
    """Tell whether a tensor belongs to a multi-token prediction layer after the last layer."""
    if not meta.count("nextn_predict_layers"):
        return False
    layer = stored.split(".")[1] if stored.startswith("blk.") else ""
    return layer.isdecimal() and len(layer) < 10 and int(layer) >= (meta.layers() or 0)


def _facts(file: MappedFile, header: GGUFHeader, names: Mapping[str, list[str]]) -> dict[str, Any]:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        file.refuse("has no matrix token_embd.weight: the file is not a complete model")
    held: dict[str, set[int]] = {}
    for name in names:
        if (layer := layer_of(name)) is not None:
            held.setdefault(name.split(".", 3)[3], set()).add(layer)
    return {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "held": {path: frozenset(layers) for path, layers in held.items()},
    }


def _stated(config: ModelConfig, file: MappedFile, header: GGUFHeader) -> dict[str, np.ndarray]:
    """Return the tensors of one number that the metadata list for all layers."""
    tensors: dict[str, np.ndarray] = {}
    layers = config.values["num_hidden_layers"]
    for tensor, key in config.family.gguf.arrays.items() if config.family.gguf is not None else ():
        numbers = header.metadata.get(key, [])
        numeric = isinstance(numbers, list) and all(type(number) in (int, float) for number in numbers)
        if not numeric or len(numbers) not in (0, layers):
            file.refuse(f"{key} is {str(numbers)[:60]}, expected a number for each of {layers} layers")
        arrays = np.asarray(numbers, np.float32)[:, None]
        tensors |= {f"model.layers.{layer}.{tensor}": array for layer, array in enumerate(arrays)}
    return tensors


def _check_heads(config: ModelConfig, file: MappedFile, header: GGUFHeader) -> None:
    """Check that rows of q and k split into heads of pairs, so that they can be reordered."""
    for count_key, key in (("num_attention_heads", "attn_q"), ("num_key_value_heads", "attn_k")):
        count = config.values[count_key]
        rows = [info.shape[0] for name, info in header.tensors.items() if f".{key}." in name and info.shape]
        if type(count) is not int or count <= 0 or any(n % (2 * count) for n in rows):
            file.refuse(f"rows of {key} do not split into {count!r} heads: the metadata do not fit the weights")
