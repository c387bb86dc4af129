"""Write the files of a merged checkpoint other than its weights: configuration, tokenizer, templates, licence."""

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.hub import COMPANIONS, fetch_companions, is_hub_id, public_name
from jcrosslora.checkpoint.shards import INDEX
from jcrosslora.checkpoint.store import read_json_object
from jcrosslora.checkpoint.tokenizer_gguf import bos_of, build_backend, read_metadata
from jcrosslora.errors import CheckpointError

CONFIG = "config.json"
# Hidden files, files of other checkpoints in the folder, and files that are written anew.
_NOT_COPIED = (".*", CONFIG, INDEX, "*.index.json", "adapter_config.json", "merge_report.json", "transfer_report.json")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_PATH_KEYS = ("_name_or_path", "name_or_path")


def write_companions(
    base: BaseModel, folder: Path, dtype: str, *, as_stored: bool, untied: bool = False
) -> tuple[str, ...]:
    """Write all files of a merged checkpoint except its weights.

    Args:
        base: the base model.
        folder: to write into.
        dtype: of the weights; "keep" leaves those of the base.
        as_stored: whether the weights have the names and layout of the base's files, and so its configuration.
        untied: whether the head is no longer the embedding, against the base's configuration.

    Returns:
        Files that could not be written, one sentence each.

    Raises:
        CheckpointError: a file of the base cannot be read.
    """
    config = read_json_object(base.path / CONFIG) if as_stored and base.path is not None else _read_config(base)
    if dtype != "keep" or not as_stored:
        config = _with_dtype(config, "bfloat16" if dtype == "keep" else dtype)
    if untied or (_says_tied(config, base) and not base.tied):
        config = _without_tie(config)
    _write(folder / CONFIG, config)
    companions = base.path or base.tokenizer_path
    if companions is None:
        return ("no tokenizer was written: none was given with the base in memory",)
    if companions.is_file():
        return _write_gguf_tokenizer(companions, folder)
    if base.revision is not None and is_hub_id(base.ref) and not Path(base.ref).exists():
        fetch_companions(base.ref, base.revision)
    for path in sorted(companions.iterdir()):
        if path.is_file() and _belongs(path.name):
            shutil.copyfile(path, folder / path.name)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and "name_or_path" in (found := read_json_object(tokenizer)):
        _write(tokenizer, found)
    return ()


def _write(path: Path, config: Mapping[str, Any]) -> None:
    """Write a configuration; the path that transformers loaded it from keeps its last part alone."""
    names = {key: public_name(value) for key in _PATH_KEYS if isinstance(value := config.get(key), str)}
    path.write_text(json.dumps({**config, **names}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _belongs(name: str) -> bool:
    return any(fnmatch(name, kind) for kind in COMPANIONS) and not any(fnmatch(name, kind) for kind in _NOT_COPIED)


def _read_config(base: BaseModel) -> dict[str, Any]:
    """Return the configuration of the dequantised text model."""
    config = {key: value for key, value in base.config.items() if key not in _QUANTIZATION_KEYS and value is not None}
    return config | {"architectures": [base.family.architectures[0]]}


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Set the number format of the weights, also in the parts of a multimodal configuration."""
    changed = {
        key: _with_dtype(value, dtype) if key in ("text_config", "vision_config") and isinstance(value, dict) else value
        for key, value in config.items()
    }
    keys = [key for key in _DTYPE_KEYS if key in config] or ["dtype"]
    return changed | dict.fromkeys(keys, dtype)


def _says_tied(config: Mapping[str, Any], base: BaseModel) -> bool:
    return any(base.family.is_tied(part) for part in (config, config.get("text_config") or {}))


def _without_tie(config: Mapping[str, Any]) -> dict[str, Any]:
    """Untie the head from the embedding, also in the text part of a multimodal configuration."""
    text = config.get("text_config")
    parts = {"text_config": _without_tie(text)} if isinstance(text, dict) else {}
    return {**config, **parts, "tie_word_embeddings": False}


def _write_gguf_tokenizer(path: Path, folder: Path) -> tuple[str, ...]:
    metadata = read_metadata(path)
    try:
        backend = build_backend(metadata, path)
    except CheckpointError as error:
        return (f"no tokenizer was written: {error}",)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        token = backend.id_to_token(index) if type(index) is int else None
        if token is not None:
            settings[f"{role}_token"] = token
    bos = bos_of(metadata)
    if bos is not None:
        from tokenizers.processors import TemplateProcessing

        token = backend.id_to_token(bos)
        backend.post_processor = TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, bos)]
        )
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    _write(folder / "tokenizer_config.json", settings)
    return ()
