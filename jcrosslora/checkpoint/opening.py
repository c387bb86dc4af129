"""Open a base model from a folder, a GGUF file or a hub id."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jcrosslora.checkpoint import hub
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.config import read_config, read_dims
from jcrosslora.checkpoint.families import Family
from jcrosslora.checkpoint.gguf import open_gguf
from jcrosslora.checkpoint.layout import build_modules, check_tensors, fused_rows
from jcrosslora.checkpoint.quantised import with_weights
from jcrosslora.checkpoint.shards import ShardedStore
from jcrosslora.checkpoint.store import TensorStore
from jcrosslora.errors import CheckpointError


def open_base(ref: str | Path, *, revision: str | None = None, name: str | None = None) -> BaseModel:
    """Open a base model; its headers are read and checked, its weights are not.

    Args:
        ref: a folder with config.json and safetensors, a .gguf file, or a hub id "org/name".
        revision: branch, tag or commit of a hub id; of files that are here only the commit that they are known as.
        name: what adapters should name as their base; the rule without it is at `BaseModel.name`.

    Returns:
        The base model.

    Raises:
        CheckpointError: not found, not of that revision, of an unknown family, or files that do not fit their
            configuration.
    """
    try:
        path = Path(ref).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # No such home, a name that is too long.
        reason = getattr(error, "strerror", None) or error
        msg = f"{str(ref)[:80]}: not a path ({reason}): give a folder, a .gguf file or a hub id of the form org/name"
        raise CheckpointError(msg) from error
    if is_folder:
        hub.check_revision(ref, path, revision)
        return _open_folder(path, str(ref), name, hub.cached_identity(path))
    if is_file:
        hub.check_revision(ref, path, revision)
        return _open_file(path, str(ref), name)
    if isinstance(ref, str) and hub.is_hub_id(ref):
        folder = hub.fetch(ref, revision)
        return _open_folder(folder, ref, name, (ref, folder.name))
    msg = f"{ref}: no such folder or file, and not a hub id of the form org/name"
    raise CheckpointError(msg)


def _open_folder(folder: Path, ref: str, name: str | None, identity: tuple[str, str] | None) -> BaseModel:
    config = read_config(folder)
    store = with_weights(ShardedStore(folder, config.prefixes), config.values, str(folder))
    hub_id, revision = identity or (None, None)
    return _build(name or hub_id or str(folder), ref, folder, revision, config.family, config.values, store)


def _open_file(path: Path, ref: str, name: str | None) -> BaseModel:
    if path.suffix != ".gguf":
        msg = f"{ref}: is a file, wanted a .gguf file or the folder that holds config.json and the weights"
        raise CheckpointError(msg)
    config, store, named = open_gguf(path)
    return _build(name or named or str(path), ref, path, None, config.family, config.values, store)


def _build(
    name: str,
    ref: str,
    path: Path,
    revision: str | None,
    family: Family,
    config: Mapping[str, Any],
    store: TensorStore,
) -> BaseModel:
    dims = read_dims(config, path)
    check_tensors(family, dims, config, store, ref)
    modules = build_modules(family, dims, store)
    fused = {name: parts for layer in range(dims.layers) for name, parts in fused_rows(family, dims, layer).items()}
    return BaseModel(name, ref, path, revision, family, config, dims, modules, fused, store)
