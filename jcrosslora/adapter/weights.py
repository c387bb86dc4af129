"""The contents of an adapter of any format as PEFT would have written them: configuration and named tensors."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jcrosslora.checkpoint.safetensors import DTYPES, Entry
from jcrosslora.checkpoint.store import MappedFile
from jcrosslora.errors import AdapterError, CheckpointError

_NAME_LIMIT = 512  # characters of a tensor's name, which patterns are matched against; real ones have less than 150
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Storage(Protocol):
    """Where tensors are stored."""

    @property
    def path(self) -> Path:
        """The file; for tensors in memory a name for messages."""
        ...

    def sha256(self) -> str:
        """Hex digest of the contents."""
        ...


class Weights(Protocol):
    """Tensors by the names that PEFT gives them, read on demand; a safetensors file of PEFT satisfies this."""

    @property
    def file(self) -> Storage:
        """Where they are stored."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of each, as PEFT would store it."""
        ...

    def array(self, name: str, /) -> np.ndarray:
        """Return the tensor as PEFT would store it.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...


@dataclass(frozen=True, eq=False)
class TranslatedWeights:
    """Tensors of another format as PEFT would store them.

    Attributes:
        file: where they are stored.
        entries: what PEFT would have in its header.
        array: reads the tensor of a name.
    """

    file: MappedFile
    entries: Mapping[str, Entry]
    array: Callable[[str], np.ndarray]


class MemoryWeights:
    """Tensors in memory, such as a state dict of PEFT.

    Args:
        name: stands in messages in place of a path.
        tensors: numpy, JAX or torch arrays by PEFT's names.

    Raises:
        AdapterError: a value is not an array of a known dtype.
    """

    def __init__(self, name: str, tensors: Mapping[str, Any]):
        self.path = Path(name)
        self._arrays = {key: as_numpy(value) for key, value in tensors.items()}
        for key, array in self._arrays.items():
            if array.dtype not in _DTYPE_NAMES:
                msg = f"{name}: tensor {key!r} has dtype {array.dtype}; give arrays of numbers"
                raise AdapterError(msg)
        self.entries = {key: Entry(_DTYPE_NAMES[array.dtype], array.shape, 0) for key, array in self._arrays.items()}

    @property
    def file(self) -> "MemoryWeights":
        """The tensors themselves, which are their own storage."""
        return self

    def array(self, name: str, /) -> np.ndarray:
        """See `Weights`."""
        if name not in self._arrays:
            msg = f"{self.path}: tensor {name!r} is missing; give the whole state dict"
            raise CheckpointError(msg)
        return self._arrays[name]

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for key, array in sorted(self._arrays.items()):
            digest.update(f"{key} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def sha256(self) -> str:
        """Hex digest of all names, dtypes, shapes and values."""
        return self._digest


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
