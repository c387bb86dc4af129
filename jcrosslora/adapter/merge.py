"""Merge an adapter into the weights of its base, as a checkpoint for engines that do not load adapters.

W' = W + scale B A, or W with some rows replaced. It is computed in blocks of rows, so memory is bounded by the largest
tensor.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jcrosslora.adapter.changes import ExpertUpdate, LoRAFactors, TokenUpdate
from jcrosslora.adapter.combining import fit_to_base
from jcrosslora.adapter.experts import stored_updates
from jcrosslora.adapter.folder import CHAT_TEMPLATE, stated_template
from jcrosslora.adapter.load import load_adapter
from jcrosslora.adapter.origin import other_base
from jcrosslora.adapter.records import Adapter, check_always_active, why_idle
from jcrosslora.architectures.blocks import EMBEDDING, HEAD
from jcrosslora.checkpoint import BaseModel, describe_base, expected_shapes, open_base
from jcrosslora.checkpoint.hub import (
    COMPANIONS,
    fetch_companions,
    is_hub_id,
    local_names,
    public_json,
    publish,
)
from jcrosslora.checkpoint.layout import is_loadable
from jcrosslora.checkpoint.quantised.scaled import DTYPES as FP8_DTYPES
from jcrosslora.checkpoint.safetensors import DTYPES, INDEX, SINGLE, Piece, ShardedStore, write_pieces
from jcrosslora.checkpoint.store import read_json_object
from jcrosslora.checkpoint.tokenizer_gguf import bos_of, build_backend, read_metadata
from jcrosslora.errors import CheckpointError, OutputError
from jcrosslora.utils import version
from jcrosslora.utils.files import atomic_folder, ensure_free, output_path
from jcrosslora.utils.progress import track
from jcrosslora.utils.settings import Settings

MergeDtype = Literal["keep", "float32", "bfloat16", "float16"]
_CONFIG = "config.json"
_REPORT = "merge_report.json"
# Hidden files, files of other checkpoints in the folder, and files that are written anew.
_NOT_COPIED = (".*", _CONFIG, INDEX, "*.index.json", "adapter_config.json", _REPORT, "transfer_report.json")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_VOCABULARIES = ("tokenizer.json", "vocab.json")  # their strings are tokens
_STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHARD = 4 << 30  # bytes of a file, if the base has no shards
_BLOCK = 1 << 24  # elements computed at a time, 64 MB as float32

# Factors added to a range of rows, a change of single rows, a tensor that replaces all rows, or factors for all experts
# in their stored layout.
Updates = list[tuple[int, int, LoRAFactors] | TokenUpdate | np.ndarray | ExpertUpdate]


@dataclass(frozen=True)
class MergeSettings(Settings):
    """The settings of a merge."""

    base: str
    """The base model: a folder of safetensors, a GGUF file or a hub id."""
    adapter: str
    """An adapter for it: a folder of PEFT or MLX, a GGUF file of llama.cpp, or a hub id."""
    out: str
    """The folder to write."""
    dtype: MergeDtype = "keep"
    """Number format of the weights. keep: the dtype of each tensor, bfloat16 for quantised ones."""
    base_revision: str | None = None
    """Hub revision of the base."""
    adapter_revision: str | None = None
    """Hub revision of the adapter."""
    overwrite: bool = False
    """Replace the folder if it holds an earlier merge."""


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        modules: number of modules that were changed.
        notes: signs that the adapter belongs to another base, and parts of the base or the adapter that are missing in
            the folder, one sentence each.
        lost: whether parts of the adapter are missing.
    """

    folder: Path
    modules: int
    notes: tuple[str, ...]
    lost: bool


def merge(settings: MergeSettings) -> Merged:
    """Write a base with an adapter merged into it, as a folder of safetensors that transformers and engines load.

    A folder keeps its shards and their names; with dtype "keep", tensors that the adapter does not change are copied
    bit for bit. GGUF or quantised weights are written dequantised, with the configuration and, for GGUF, the tokenizer
    that the file describes.

    Raises:
        JCrossLoRAError: an error in the input, the settings or the output folder. Nothing is written.
    """
    out = output_path(settings.out)
    ensure_free(out, settings.overwrite)
    base = open_base(settings.base, revision=settings.base_revision)
    # Weights can hold an update of any rank, so a DoRA is merged at full rank.
    whole = max(min(module.shape) for module in base.modules.values())
    adapter = load_adapter(settings.adapter, base, revision=settings.adapter_revision, rank=whole, replaced=True)
    check_always_active(adapter, "which weights cannot express: load it as an adapter, in an engine that knows aLoRA")
    adapter = fit_to_base(adapter, describe_base(base, digest=""))
    with atomic_folder(out, settings.overwrite) as folder:
        return replace(write_merged(base, adapter, folder, settings.dtype), folder=out)


def write_merged(base: BaseModel, adapter: Adapter, folder: Path, dtype: MergeDtype = "keep") -> Merged:
    """Write a base with an adapter merged into it to an empty folder; see `merge`.

    Args:
        adapter: fitted to the base, see `fit_to_base`.
    """
    if base.expert_layout is not None and not is_loadable(base.expert_layout):
        msg = f"{base.ref}: its experts are not stored as transformers loads them, and are not written: merge "
        raise CheckpointError(msg + "into the unquantised safetensors of the model")
    as_stored = _is_plain_folder(base)
    wanted = None if dtype == "keep" else _STORED[dtype]
    updates = _updates_of(adapter, base)
    # Embedding and head become two matrices if their changes differ.
    untied = base.tied and updates.get(EMBEDDING, []) != updates.get(HEAD, [])
    files = (_stored_plan if as_stored else _read_plan)(base, updates, wanted, untied=untied)
    total = sum(piece.size for pieces in files.values() for piece in pieces)
    _check_space(folder, total)
    with track(total, "merge", "B") as bar:
        for name, pieces in files.items():
            write_pieces(folder / name, pieces, {"format": "pt"}, bar.update)
    if list(files) != [SINGLE]:
        weight_map = {piece.name: name for name, pieces in files.items() for piece in pieces}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    notes = write_companions(base, folder, dtype, as_stored=as_stored, untied=untied)
    if _write_template(adapter, folder):
        notes = (*notes, f"{CHAT_TEMPLATE} is that of the adapter")
    if untied:
        notes = (*notes, "the output head is no longer the embedding (tie_word_embeddings is false)")
    doubts = other_base(adapter.info, base), why_idle(adapter)
    notes = (*(f"warning: {sentence}" for sentence in doubts if sentence is not None), *notes)
    notes = (*(f"not merged: {sentence}" for sentence in adapter.info.ignored), *notes)
    others = {name for update in (*adapter.tokens, *adapter.replaced) for name in update.modules}
    others |= {update.name for update in adapter.experts}
    merged = Merged(folder, len(adapter.modules.keys() | others), notes, bool(adapter.info.ignored))
    (folder / _REPORT).write_text(_report(base, adapter, dtype, merged), encoding="utf-8")
    return merged


def _write_template(adapter: Adapter, folder: Path) -> bool:
    """Write the adapter's chat template unless the folder has the same one; return whether it was written."""
    template = adapter.info.chat_template
    if template is None or template == stated_template(folder):
        return False
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    return True


def _is_plain_folder(base: BaseModel) -> bool:
    """Return whether the base's files can keep their layout: GGUF and quantised files cannot."""
    store = base.store
    return isinstance(store, ShardedStore) and not any(store.dtype(name) in FP8_DTYPES for name in store.names())


def _stored_plan(
    base: BaseModel, updates: Mapping[str, Updates], wanted: str | None, *, untied: bool
) -> dict[str, list[Piece]]:
    """Plan a file for each of the base's files, with all its tensors, and with a separate head if `untied`."""
    store = base.store
    assert isinstance(store, ShardedStore)
    files: dict[str, list[Piece]] = {}
    for shard, file, names in store.stored():
        pieces = []
        for stored, name in names.items():
            entry = file.entries[stored]
            if entry.dtype not in DTYPES:
                msg = f"{file.file.path}: tensor {stored!r} has dtype {entry.dtype!r}, which is not supported"
                raise CheckpointError(msg)
            dtype = wanted if wanted is not None and entry.dtype in _FLOATS else entry.dtype
            read = partial(file.array, stored)
            own = [] if name is None else updates.get(name, [])
            if name is not None and any(isinstance(update, np.ndarray) for update in own):
                held = store.rows_held(name, stored)  # of a tensor that may be stored in parts
                own = [update[held] if isinstance(update, np.ndarray) else update for update in own]
            pieces.append(Piece(stored, dtype, entry.shape, partial(_row_blocks, base, read, own, dtype)))
            if name == EMBEDDING and untied and HEAD not in base.store.names():
                blocks = partial(_row_blocks, base, read, updates.get(HEAD, []), dtype)
                head = stored.removesuffix(EMBEDDING) + HEAD if stored.endswith(EMBEDDING) else HEAD
                pieces.append(Piece(head, dtype, entry.shape, blocks))
        files[shard] = pieces
    return files


def _read_plan(
    base: BaseModel, updates: Mapping[str, Updates], wanted: str | None, *, untied: bool
) -> dict[str, list[Piece]]:
    """Plan files of limited size for the dequantised tensors of the text model."""
    groups: list[list[Piece]] = [[]]
    config = {**base.config, "tie_word_embeddings": base.tied and not untied}
    for name, shape in expected_shapes(replace(base.architecture, config=config), base.expert_layout).items():
        own = base.store.dtype(EMBEDDING if name == HEAD and base.tied else name)
        dtype = wanted or (own if own in _FLOATS else "BF16")
        if name in (EMBEDDING, HEAD):  # by far the largest: dequantised block by block
            blocks = partial(_converted_rows, base, name, shape, updates.get(name, []), dtype)
        else:
            blocks = partial(_row_blocks, base, partial(base.store.tensor, name), updates.get(name, []), dtype)
        own_name = f"{base.family.stored.embedding}.weight" if name == EMBEDDING else name
        piece = Piece(own_name, dtype, shape, blocks)
        if groups[-1] and sum(item.size for item in groups[-1]) + piece.size > _SHARD:
            groups.append([])
        groups[-1].append(piece)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{index:05d}-of-{count:05d}.safetensors": group for index, group in enumerate(groups, 1)}


def _check_space(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < total:
        msg = f"the merged model needs {total / 1e9:.2f} GB, the disk of the output has {free / 1e9:.2f} GB free: free "
        raise OutputError(msg + "space, or choose another output")


def _report(base: BaseModel, adapter: Adapter, dtype: MergeDtype, merged: Merged) -> str:
    made = {
        "version": version(),
        "base": {"name": base.name, "ref": base.ref, "revision": base.revision},
        "adapter": {"name": adapter.info.name, "digest": adapter.info.digest, "revision": adapter.info.revision},
        "dtype": dtype,
        "modules": merged.modules,
        "whole": not merged.lost,
        "notes": list(merged.notes),
    }
    return json.dumps(publish(made, local_names(base.name, base.ref, adapter.info.name)), indent=2) + "\n"


def _updates_of(adapter: Adapter, base: BaseModel) -> dict[str, Updates]:
    """Group an adapter's updates by the base's tensor that they change; fused modules must be split already."""
    found: dict[str, Updates] = {
        name: [np.asarray(array)] for group in adapter.replaced for name, array in group.tensors.items()
    }
    for name, factors in adapter.modules.items():
        module = base.modules[name]
        start, stop = module.rows or (0, module.shape[0])
        found.setdefault(module.tensor, []).append((start, stop, factors))
    for update in adapter.tokens:
        for name in update.modules:
            found.setdefault(f"{name}.weight", []).append(update)
    for update in adapter.experts:
        for name, part in stored_updates(update, base.experts).items():
            found[name] = [part if isinstance(part, ExpertUpdate) else (0, part.shape[0], part)]
    return found


def _row_blocks(base: BaseModel, read: Callable[[], np.ndarray], updates: Updates, dtype: str) -> Iterator[np.ndarray]:
    """Yield a tensor of the base with its updates, block by block; without updates it keeps its values.

    `dtype` is named as in the header. Raises OutputError if values do not fit it.
    """
    array = read()
    for start, stop in _spans(array.shape):
        block = array[start:stop] if array.ndim else array
        yield _cast(_updated(block, start, updates), dtype) if updates else _cast(block, dtype)
        base.release()


def _converted_rows(
    base: BaseModel, name: str, shape: tuple[int, ...], updates: Updates, dtype: str
) -> Iterator[np.ndarray]:
    """Yield a matrix with its updates like `_row_blocks`, dequantised a block at a time."""
    for start, stop in _spans(shape):
        block = base.rows(name, np.arange(start, stop))
        yield _cast(_updated(block, start, updates), dtype)
        base.release()


def _spans(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last (exclusive) row of each block."""
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK // max(1, int(np.prod(shape[1:]))))
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def _updated(block: np.ndarray, first: int, updates: Updates) -> np.ndarray:
    """Apply the updates to a block of W that starts at row `first`; returns float32, or float64 if W is."""
    wide = np.float64 if block.dtype == np.float64 else np.float32
    result = block.astype(wide)
    for update in updates:
        if isinstance(update, np.ndarray):
            result[...] = update[first : first + len(block)]
            continue
        if isinstance(update, ExpertUpdate):
            every = slice(first, first + len(block))
            result += (np.asarray(update.b)[every] @ np.asarray(update.a)[every]).astype(wide)
            continue
        if isinstance(update, TokenUpdate):
            part = slice(*np.searchsorted(update.ids, (first, first + len(block))))
            rows = update.ids[part] - first
            result[rows] = update.changed(result[rows], part)
            continue
        start, stop, factors = update
        low, high = max(start, first), min(stop, first + len(block))
        if low < high:
            b = np.asarray(factors.b)[low - start : high - start].astype(np.float64) * factors.scale
            result[low - first : high - first] += b.astype(wide) @ np.asarray(factors.a).astype(wide)
    return result


def _cast(block: np.ndarray, dtype: str) -> np.ndarray:
    kind = DTYPES[dtype]
    if block.dtype == kind:
        return block
    with np.errstate(over="ignore"):
        cast = block.astype(kind)
    if not np.isfinite(cast).all() and np.isfinite(block).all():
        msg = f"weights up to {np.abs(block).max():.3g} do not fit {kind.name}: write them with --dtype bfloat16"
        raise OutputError(msg)
    return cast


def write_companions(
    base: BaseModel, folder: Path, dtype: str, *, as_stored: bool, untied: bool = False
) -> tuple[str, ...]:
    """Write configuration, tokenizer, templates and licence of a merged checkpoint.

    Args:
        dtype: of the weights; "keep" leaves those of the base.
        as_stored: whether the weights keep the names and layout of the base's files, and so its configuration.
        untied: whether the head is no longer the embedding, unlike in the base's configuration.

    Returns:
        Files that could not be written, one sentence each.
    """
    if as_stored and base.path is not None:
        config = read_json_object(base.path / _CONFIG)
    else:  # the dequantised text model
        stated = base.config.items()
        config = {key: value for key, value in stated if key not in _QUANTIZATION_KEYS and value is not None}
        config |= {"architectures": [base.family.architectures[0]]}
    if dtype != "keep" or not as_stored:
        config = _with_dtype(config, "bfloat16" if dtype == "keep" else dtype)
    says_tied = any(base.family.is_tied(part) for part in (config, config.get("text_config") or {}))
    if untied or (says_tied and not base.tied):
        config = _without_tie(config)
    _write_config(folder / _CONFIG, config)
    companions = base.path or base.tokenizer_path
    if companions is None:
        return ("no tokenizer was written: none was given with the base in memory",)
    if companions.is_file():
        return _write_gguf_tokenizer(companions, folder)
    if base.revision is not None and is_hub_id(base.ref) and not Path(base.ref).exists():
        fetch_companions(base.ref, base.revision)
    for path in sorted(companions.iterdir()):
        wanted, unwanted = (any(fnmatch(path.name, kind) for kind in kinds) for kinds in (COMPANIONS, _NOT_COPIED))
        if path.is_file() and wanted and not unwanted:
            shutil.copyfile(path, folder / path.name)
            if path.suffix == ".json" and path.name not in _VOCABULARIES:
                text = path.read_text(encoding="utf-8", errors="surrogateescape")
                if (public := public_json(text)) != text:
                    (folder / path.name).write_text(public, encoding="utf-8", errors="surrogateescape")
    return ()


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    """Write a configuration without local paths, such as the one that transformers loaded it from."""
    path.write_text(public_json(json.dumps(config, indent=2, ensure_ascii=False) + "\n"), encoding="utf-8")


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Set the number format of the weights, also in the parts of a multimodal configuration."""
    parts = {key: value for key in ("text_config", "vision_config") if isinstance(value := config.get(key), dict)}
    changed = {key: _with_dtype(value, dtype) for key, value in parts.items()}
    return {**config, **changed, **dict.fromkeys([key for key in _DTYPE_KEYS if key in config] or ["dtype"], dtype)}


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
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    _write_config(folder / "tokenizer_config.json", settings)
    return ()
