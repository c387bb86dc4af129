"""Open a GGUF model: its tensors by Hugging Face name, and its configuration."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jcrosslora.architectures.architecture import Architecture
from jcrosslora.architectures.blocks import ROLE_PATHS
from jcrosslora.architectures.family import Family
from jcrosslora.checkpoint.config import ModelConfig, check_config, read_dims
from jcrosslora.checkpoint.gguf_config import translate
from jcrosslora.checkpoint.gguf_header import GGUFHeader, read_header
from jcrosslora.checkpoint.gguf_metadata import Metadata, model_name
from jcrosslora.checkpoint.gguf_names import block_names, hf_name, permutes_heads
from jcrosslora.checkpoint.gguf_store import GGUFStore, stored_rows, to_float
from jcrosslora.checkpoint.gguf_tensors import find_sources
from jcrosslora.checkpoint.layout import layer_of
from jcrosslora.checkpoint.store import MappedFile
from jcrosslora.errors import CheckpointError

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def open_gguf(path: Path) -> tuple[ModelConfig, GGUFStore, str | None]:
    """Open a GGUF model.

    Args:
        path: the file.

    Returns:
        Its configuration, its tensors, and its name in the metadata.

    Raises:
        CheckpointError: the gguf package is missing, or the file is corrupt, truncated or not supported.
    """
    gguf, file, header = open_header(path)
    meta = Metadata(header.metadata, path)
    names = _hf_names(header, meta)
    factors = {name: _factor(file, header, name, gguf) for name in _ROPE_TENSORS if name in header.tensors}
    config = check_config(translate(meta, _facts(header, names, path), factors), path)
    if permutes_heads(meta.arch):
        _check_heads((config.values["num_attention_heads"], config.values["num_key_value_heads"]), header, path)
    stated = _stated(config.family, header.metadata, config.values["num_hidden_layers"], path)
    shapes = {name: info.shape for name, info in header.tensors.items()}
    model = Architecture(config.family, config.values, read_dims(config, path))
    try:
        unknown = _other_module(names, model)
        sources = find_sources(names, shapes, model)
    except CheckpointError as error:
        msg = f"{path}: {error}"
        raise CheckpointError(msg) from None
    if unknown is not None:
        raise CheckpointError(_unknown(unknown, meta))
    store = GGUFStore(file, header, gguf, sources, stated)
    return config, store, model_name(header.metadata)


def open_header(path: Path) -> tuple[ModuleType, MappedFile, GGUFHeader]:
    """Return the gguf package, the mapped file and its header; the file may be a model or an adapter.

    Raises:
        CheckpointError: the package is missing, or the file is corrupt, truncated or of a quantisation that cannot be
            read.
    """
    gguf = _import_gguf(path)
    file = MappedFile(path)
    header = read_header(file, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    _check_types(header, gguf, path)
    return gguf, file, header


def _import_gguf(path: Path) -> ModuleType:
    try:
        importlib.import_module("gguf.quants")
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        msg = f"{path}: reading GGUF needs the gguf package: pip install 'jcrosslora[gguf]'"
        raise CheckpointError(msg) from error


def _hf_names(header: GGUFHeader, meta: Metadata) -> dict[str, list[str]]:
    """Return the tensors of the file that hold the rows of each tensor of the model, in the order of the rows."""
    order = {stored: place for place, stored in enumerate(block_names(meta.arch))}
    names: dict[str, list[str]] = {}
    for stored in header.tensors:
        if stored in _ROPE_TENSORS or _predicts_further(stored, meta):
            continue
        name = hf_name(stored, meta.arch)
        if name is None:
            raise CheckpointError(_unknown(stored, meta))
        names.setdefault(name, []).append(stored)
    return {name: sorted(stored, key=lambda one: order.get(one.split(".", 2)[-1], 0)) for name, stored in names.items()}


def _other_module(names: Mapping[str, list[str]], model: Architecture) -> str | None:
    """Return a tensor of the file whose linear module other models of the same blocks have and this one has not."""
    if model.dims.layers > len(names):
        return None  # refused for that by `check_tensors`
    others = {path for role, path in ROLE_PATHS.items() if role not in model.role_shapes}
    others -= {ROLE_PATHS[role] for role in model.role_shapes} | model.family.fused.keys()
    found = (stored[0] for name, stored in names.items() if name.split(".", 3)[-1].rpartition(".")[0] in others)
    return next(found, None)


def _unknown(stored: str, meta: Metadata) -> str:
    return f"{meta.path}: tensor {stored!r} is not known for architecture {meta.arch!r}: it may change the model"


def _predicts_further(stored: str, meta: Metadata) -> bool:
    """Whether a tensor belongs to a layer behind the last that predicts further tokens."""
    if not meta.count("nextn_predict_layers"):
        return False
    layer = stored.split(".")[1] if stored.startswith("blk.") else ""
    return layer.isdecimal() and len(layer) < 10 and int(layer) >= (meta.layers() or 0)


def _check_types(header: GGUFHeader, gguf: ModuleType, path: Path) -> None:
    """Refuse types that cannot be dequantised, by a block of zeros of each type in use."""
    for kind in {info.kind for info in header.tensors.values()}:
        to_float(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind, gguf, path)


def _factor(file: MappedFile, header: GGUFHeader, name: str, gguf: ModuleType) -> np.ndarray:
    info = header.tensors[name]
    return to_float(stored_rows(file, info, gguf), info.kind, gguf, file.path).astype(np.float32).reshape(-1)


def _facts(header: GGUFHeader, names: Mapping[str, list[str]], path: Path) -> dict[str, Any]:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        msg = f"{path}: has no matrix token_embd.weight: the file is not a complete model"
        raise CheckpointError(msg)
    held: dict[str, set[int]] = {}
    for name in names:
        if (layer := layer_of(name)) is not None:
            held.setdefault(name.split(".", 3)[3], set()).add(layer)
    return {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "held": {path: frozenset(layers) for path, layers in held.items()},
    }


def _stated(family: Family, metadata: Mapping[str, Any], layers: Any, path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of one number that the metadata list for all layers."""
    tensors: dict[str, np.ndarray] = {}
    for tensor, key in family.gguf.arrays.items() if family.gguf is not None else ():
        numbers = metadata.get(key, [])
        if not isinstance(numbers, list) or len(numbers) not in (0, layers) or not all(map(_is_number, numbers)):
            msg = f"{path}: {key} is {str(numbers)[:60]}, wanted a number for each of {layers} layers"
            raise CheckpointError(msg)
        arrays = np.asarray(numbers, np.float32)[:, None]
        tensors |= {f"model.layers.{layer}.{tensor}": array for layer, array in enumerate(arrays)}
    return tensors


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _check_heads(heads: tuple[Any, Any], header: GGUFHeader, path: Path) -> None:
    """Check that rows of q and k split into heads of pairs, so that they can be reordered."""
    for count, key in zip(heads, ("attn_q", "attn_k"), strict=True):
        rows = [info.shape[0] for name, info in header.tensors.items() if f".{key}." in name and info.shape]
        if type(count) is not int or count <= 0 or any(n % (2 * count) for n in rows):
            msg = f"{path}: rows of {key} do not split into {count!r} heads: the metadata do not fit the weights"
            raise CheckpointError(msg)
