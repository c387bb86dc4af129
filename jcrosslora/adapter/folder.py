"""Find the two files of an adapter: in a folder, or on the hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.checkpoint.jsonfile import read_json_object
from jcrosslora.checkpoint.safetensors import SafetensorsFile
from jcrosslora.errors import AdapterError, CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"
_NAME_LIMIT = 512  # of a tensor's name, which patterns are matched against; real ones have less than 150 characters


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of an adapter, and the name that it was asked for by."""

    name: str
    config: Path
    weights: Path


def find_adapter(ref: str | Path, revision: str | None = None) -> AdapterFiles:
    """The files of the adapter `ref`: a folder, or a hub id.

    Raises:
        AdapterError: there is no such folder or repository, or one of the files is missing.
    """
    try:
        folder = Path(ref).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # No such home, a name that is too long.
        msg = f"{str(ref)[:80]}: not a path ({error}): give a folder with {CONFIG} and {WEIGHTS}, or a hub id"
        raise AdapterError(msg) from error
    if is_folder:
        return _local_files(folder)
    if is_there:
        msg = f"{ref}: a file, the folder that holds {CONFIG} and {WEIGHTS} was wanted"
        raise AdapterError(msg)
    if isinstance(ref, str) and is_hub_id(ref):
        return AdapterFiles(ref, *(_download(ref, name, revision) for name in (CONFIG, WEIGHTS)))
    msg = f"{ref}: no such folder: give a folder with {CONFIG} and {WEIGHTS}, or a hub id such as owner/name"
    raise AdapterError(msg)


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in an `adapter_config.json`.

    Raises:
        AdapterError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        return read_json_object(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def open_weights(path: Path) -> SafetensorsFile:
    """The weights file with its header checked.

    Raises:
        AdapterError: missing, truncated, not a safetensors file, or one with absurdly long names.
    """
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if (longest := max(map(len, file.entries), default=0)) > _NAME_LIMIT:
        msg = f"{path}: a tensor's name has {longest} characters, at most {_NAME_LIMIT} are read: the file is damaged"
        raise AdapterError(msg)
    return file


def _local_files(folder: Path) -> AdapterFiles:
    files = AdapterFiles(str(folder), folder / CONFIG, folder / WEIGHTS)
    if not files.config.is_file():
        msg = f"{folder}: no {CONFIG} here: give the folder of a PEFT adapter"
        raise AdapterError(msg)
    if not files.weights.is_file():
        msg = f"{folder}: {_missing_weights(folder)}"
        raise AdapterError(msg)
    return files


def _missing_weights(folder: Path) -> str:
    if (folder / PICKLE).is_file():
        return (
            f"only {PICKLE}, a pickle that can run code when it is read, {WEIGHTS} was wanted: load it with peft "
            "where you trust it and save it again with save_pretrained(..., safe_serialization=True)"
        )
    if (folder / MLX_WEIGHTS).is_file():
        return f"{MLX_WEIGHTS} is an adapter in the format of MLX, {WEIGHTS} was wanted: convert it to PEFT first"
    return f"no {WEIGHTS} here: give the folder of a PEFT adapter"


def _download(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        msg = f"{repo}: no such folder, and {name} cannot be had from the hub ({type(error).__name__}: {reason})"
        msg += ": check the name, the revision and the connection"
        raise AdapterError(msg) from error
