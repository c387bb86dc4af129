"""Tensors that a program already holds, by their Hugging Face names."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.checkpoint.safetensors import DTYPES
from jcrosslora.errors import CheckpointError

_CODES = {dtype.name: code for code, dtype in DTYPES.items()}


class MemoryStore:
    """A `TensorStore` of arrays in memory.

    Arrays are neither copied nor converted until they are read, so they must not change while the base is in use.

    Args:
        arrays: name -> array with `shape` and `dtype`: numpy, jax or torch, on any device.
        ref: names the base in errors.

    Raises:
        CheckpointError: a value that is no array, holds no data, or has a dtype that cannot be read.
    """

    def __init__(self, arrays: Mapping[str, Any], ref: str):
        self._arrays, self._ref = dict(arrays), ref
        for name, array in arrays.items():
            self._check(name, array)

    def _check(self, name: str, array: Any) -> None:
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            msg = f"{self._ref}: {name!r} is of type {type(array).__name__}, wanted a numpy, jax or torch array"
            raise CheckpointError(msg)
        if getattr(array, "is_meta", False):
            msg = f"{self._ref}: tensor {name!r} is on the meta device and holds no data: load the weights first"
            raise CheckpointError(msg)
        if _dtype_name(array) not in _CODES:
            msg = f"{self._ref}: tensor {name!r} has dtype {_dtype_name(array)}, which is not supported"
            raise CheckpointError(msg)

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            msg = f"{self._ref}: the weights have no tensor {name!r}"
            raise CheckpointError(msg)
        return self._arrays[name]

    @property
    def files(self) -> tuple[Path, ...]:
        """No file."""
        return ()

    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._array(name).shape)

    def dtype(self, name: str) -> str:
        """Dtype as safetensors names it, e.g. "BF16"."""
        return _CODES[_dtype_name(self._array(name))]

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of an array on the host, a copy of one on a device."""
        return _to_numpy(self._array(name))

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """float32 (n, columns): only these rows leave the device."""
        return _to_numpy(self._array(name)[ids]).astype(np.float32)

    def release(self) -> None:
        """Do nothing: the arrays belong to the caller."""

    def sha256s(self) -> list[str]:
        """One hex digest, of names, dtypes, shapes and numbers, whatever the order and the library of the arrays."""
        names = sorted(self._arrays)
        header = [[name, self.dtype(name), self.shape(name)] for name in names]
        digest = hashlib.sha256(json.dumps(header).encode())
        for name in names:
            digest.update(np.ascontiguousarray(self.tensor(name)).reshape(-1).view(np.uint8).data)
        return [digest.hexdigest()]


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _to_numpy(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        dtype = DTYPES[_CODES[_dtype_name(array)]]
        if dtype.kind == "V":  # numpy knows bfloat16 and FP8 by ml_dtypes, which torch does not: pass the bits.
            array = array.view(getattr(sys.modules["torch"], f"int{8 * dtype.itemsize}"))
        array = array.numpy().view(dtype)
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view
