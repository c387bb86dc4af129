"""The contents of an adapter of any format as PEFT would have written them: configuration and named tensors."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jcrosslora.checkpoint.safetensors import DTYPES, Entry
from jcrosslora.checkpoint.store import MappedFile
from jcrosslora.errors import AdapterError, CheckpointError

_NAME_LIMIT = 512  # characters of a tensor's name, which patterns are matched against; real ones have less than 150
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Weights:
    """Tensors by the names that PEFT gives them, read on demand.

    Attributes:
        path: the file; for tensors in memory a name for messages.
        entries: dtype and shape of each, as PEFT would store it.
        array: returns the tensor of a name, as PEFT would store it; raises CheckpointError if it cannot be read.
        sha256: returns the hex digest of the contents.
    """

    path: Path
    entries: Mapping[str, Entry]
    array: Callable[[str], np.ndarray]
    sha256: Callable[[], str]

    @classmethod
    def of_file(cls, file: MappedFile, entries: Mapping[str, Entry], array: Callable[[str], np.ndarray]) -> "Weights":
        """Describe the tensors of a file."""
        return cls(file.path, entries, array, file.sha256)

    @classmethod
    def of_memory(cls, name: str, tensors: Mapping[str, Any]) -> "Weights":
        """Take tensors in memory, such as a state dict of PEFT.

        Args:
            name: stands in messages in place of a path.
            tensors: numpy, JAX or torch arrays by PEFT's names.

        Raises:
            AdapterError: a value is not an array of a known dtype.
        """
        arrays = {key: as_numpy(value) for key, value in tensors.items()}
        for key, array in arrays.items():
            if array.dtype not in _DTYPE_NAMES:
                msg = f"{name}: tensor {key!r} has dtype {array.dtype}; give arrays of numbers"
                raise AdapterError(msg)
        entries = {key: Entry(_DTYPE_NAMES[array.dtype], array.shape, 0) for key, array in arrays.items()}

        def array_of(key: str) -> np.ndarray:
            if key not in arrays:
                msg = f"{name}: tensor {key!r} is missing; give the whole state dict"
                raise CheckpointError(msg)
            return arrays[key]

        return cls(Path(name), entries, array_of, lambda: _digest(arrays))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the hex digest of all names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class PeftContents:
    """An adapter whose headers have been read.

    Attributes:
        config: `adapter_config.json` as PEFT would have it.
        weights: its tensors.
        stated: the configuration in the files, in their own format.
        notes: settings that are not read, one sentence each.
    """

    config: Mapping[str, Any]
    weights: Weights
    stated: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def as_numpy(value: Any) -> np.ndarray:
    """Return a numpy, JAX or torch array as numpy, in its own dtype."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import torch

    value = value.detach().cpu()
    # numpy itself has no bfloat16.
    half = value.dtype == torch.bfloat16
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if half else value.numpy()


def check_names(path: Path, names: Mapping[str, object]) -> None:
    """Refuse a file with absurdly long tensor names.

    Raises:
        AdapterError: there is one.
    """
    if (longest := max(map(len, names), default=0)) > _NAME_LIMIT:
        msg = f"{path}: a tensor's name has {longest} characters, at most {_NAME_LIMIT} are read"
        raise AdapterError(msg + ": the file is damaged")
