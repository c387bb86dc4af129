"""Read a PEFT LoRA adapter into memory."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.config import check_config, config_notes
from jcrosslora.adapter.folder import AdapterFiles, find_adapter, open_weights, read_config
from jcrosslora.adapter.kinds import REFUSED_TENSORS
from jcrosslora.adapter.names import TensorName, natural_key, parse_tensor_name, text_module_name
from jcrosslora.adapter.patterns import matching_key, module_rank, module_scale
from jcrosslora.adapter.records import Adapter, AdapterInfo, LoRAFactors
from jcrosslora.checkpoint.hub import cached_identity
from jcrosslora.checkpoint.safetensors import SafetensorsFile
from jcrosslora.errors import AdapterError, CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")

# What of the file does not move, by kind of tensor.
_IGNORED = {
    "embedding": "LoRA of an embedding is not moved: {names}.",
    "head": "LoRA of the output head is not moved: {names}.",
    "tokens": "trained tokens do not map to another tokenizer and are not moved: {names}.",
    "bias": "trained biases are not moved: {names}.",
    "full": "whole tensors (modules_to_save) are not moved: {names}.",
}


def load_adapter(ref: str | Path, *, revision: str | None = None) -> Adapter:
    """Read a PEFT LoRA adapter.

    Args:
        ref: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id (`HF_HUB_OFFLINE` is
            respected; only these two files are fetched).
        revision: branch, tag or commit of the hub repository.

    Returns:
        The factors in their stored dtype, a (K, I) and b (O, K), with scale alpha / r or alpha / sqrt(r); module
        names as the base spells them (`model.layers.0.self_attn.q_proj`). The keys of the file decide which modules
        there are, not `target_modules`. What does not move is listed in `info.ignored`.

    Raises:
        AdapterError: not there, damaged, or not a plain LoRA adapter (the kind is named).
    """
    files = find_adapter(ref, revision)
    config = read_config(files.config)
    check_config(config, str(files.config))
    file = open_weights(files.weights)
    tensors = [parse_tensor_name(key) for key in file.entries]
    _refuse_tensors(tensors, files.weights)
    pairs, ignored = _sort_tensors(tensors)
    modules = _read_modules(file, pairs, config)
    if not modules:
        found = "; ".join(ignored) or "it is empty"
        msg = f"{files.weights}: holds no LoRA of a linear layer ({found.rstrip('.')}): nothing can be moved"
        raise AdapterError(msg)
    info = AdapterInfo(
        name=files.name,
        base_name=_text_or_none(config.get("base_model_name_or_path")),
        config=config,
        digest=f"sha256:{file.file.sha256()}",
        revision=_commit(files),
        ignored=tuple(config_notes(config) + ignored),
    )
    return Adapter(modules=modules, info=info)


def _refuse_tensors(tensors: Sequence[TensorName], path: Path) -> None:
    for tensor in tensors:
        if tensor.kind in REFUSED_TENSORS:
            msg = f"{path}: tensor {tensor.key!r} is of a kind that is not supported, {REFUSED_TENSORS[tensor.kind]}"
            raise AdapterError(msg)
        if tensor.kind in ("A", "B") and tensor.module.endswith(".base_layer"):
            msg = f"{path}: tensor {tensor.key!r} is a LoRA of expert parameters (target_parameters), not supported"
            msg += "; train an adapter of linear layers instead"
            raise AdapterError(msg)


def _sort_tensors(tensors: Sequence[TensorName]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Keys of the factors by module (as the file spells it), and a sentence for each kind that does not move."""
    pairs: dict[str, dict[str, str]] = defaultdict(dict)
    ignored: dict[str, list[str]] = defaultdict(list)
    for tensor in tensors:
        if tensor.kind in ("A", "B") and text_module_name(tensor.module) != "lm_head":
            pairs[tensor.module][tensor.kind] = tensor.key
        elif tensor.kind != "copy":
            ignored["head" if tensor.kind in ("A", "B") else tensor.kind].append(tensor.module)
    sentences = [_IGNORED[kind].format(names=_listed(names)) for kind, names in ignored.items()]
    return dict(sorted(pairs.items(), key=lambda item: natural_key(item[0]))), sentences


def _read_modules(
    file: SafetensorsFile, pairs: Mapping[str, Mapping[str, str]], config: Mapping[str, Any]
) -> dict[str, LoRAFactors]:
    modules: dict[str, LoRAFactors] = {}
    for module, keys in pairs.items():
        name = text_module_name(module)
        if name in modules:
            msg = f"{file.file.path}: module {name!r} occurs under two spellings: remove one of them"
            raise AdapterError(msg)
        modules[name] = _read_factors(file, module, keys, config)
    return modules


def _read_factors(
    file: SafetensorsFile, module: str, keys: Mapping[str, str], config: Mapping[str, Any]
) -> LoRAFactors:
    path = file.file.path
    if len(keys) != 2:
        have, lacks = ("A", "B") if "A" in keys else ("B", "A")
        msg = f"{path}: module {module!r} has lora_{have} without its lora_{lacks}: the file is incomplete"
        msg += "; save or download it again"
        raise AdapterError(msg)
    a, b = (_read_matrix(file, keys[side]) for side in "AB")
    _check_rank(path, module, a, b, config)
    return LoRAFactors(a=a, b=b, scale=module_scale(config, _pattern_name(config, module), a.shape[0]))


def _check_rank(path: Path, module: str, a: np.ndarray, b: np.ndarray, config: Mapping[str, Any]) -> None:
    if a.shape[0] != b.shape[1]:
        msg = f"{path}: module {module!r} has A of shape {list(a.shape)} and B of shape {list(b.shape)}"
        msg += ": A [r, in] and B [out, r] of one rank were wanted; the file is damaged"
        raise AdapterError(msg)
    wanted = module_rank(config, _pattern_name(config, module))
    if a.shape[0] != wanted:
        msg = f"{path}: module {module!r} has rank {a.shape[0]}, adapter_config.json says {wanted}"
        msg += ": correct r or rank_pattern, or use the configuration that belongs to the file"
        raise AdapterError(msg)


def _read_matrix(file: SafetensorsFile, key: str) -> np.ndarray:
    """A copy, C-contiguous and in the machine's memory, of a matrix of finite numbers."""
    path, entry = file.file.path, file.entries[key]
    if entry.dtype not in FLOATS:
        msg = f"{path}: tensor {key!r} has dtype {entry.dtype}, one of {', '.join(FLOATS)} was wanted: convert it"
        raise AdapterError(msg)
    if len(entry.shape) != 2 or 0 in entry.shape:
        msg = f"{path}: tensor {key!r} has shape {list(entry.shape)}, a matrix was wanted"
        msg += ": LoRA of other layers than linear ones is not supported"
        raise AdapterError(msg)
    try:
        array = np.array(file.array(key), order="C")
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if not np.isfinite(array).all():
        msg = f"{path}: tensor {key!r} holds NaN or infinite values: the adapter is damaged, use another checkpoint"
        raise AdapterError(msg)
    return array


def _pattern_name(config: Mapping[str, Any], module: str) -> str:
    """The spelling of the module name that the patterns are written for: that of the file, else that of text models."""
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    return module if matching_key(patterns, module) else text_module_name(module)


def _commit(files: AdapterFiles) -> str | None:
    """The hub commit that the files are of, where they were asked for by a hub id."""
    identity = cached_identity(files.config.parent)
    return identity[1] if identity is not None and identity[0] == files.name else None


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _listed(names: Sequence[str], shown: int = 3) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
