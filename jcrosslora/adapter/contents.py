"""The contents of adapter files of any format: tensors under PEFT's names, and matrices to write.

Matrices are written in one dtype, with the scale inside B.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors.numpy

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.records import Adapter
from jcrosslora.checkpoint.base import BaseInfo
from jcrosslora.checkpoint.safetensors import DTYPES, Entry
from jcrosslora.checkpoint.wrapped import TEXT, class_module_name
from jcrosslora.errors import AdapterError, CheckpointError, OutputError

FileDtype = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BASE = "jcrosslora.target"  # header key of a weights file: name, revision and digest of the base, as JSON
_NAME_LIMIT = 512  # characters of a tensor's name, which patterns are matched against; real ones have less than 150


@dataclass(frozen=True, eq=False)
class PeftView:
    """An adapter as PEFT would have stored it; its tensors are read on demand.

    Attributes:
        path: of the weights file; for tensors in memory, a name for messages.
        entries: dtype and shape of each tensor.
        array: returns a tensor by name; raises CheckpointError if it cannot be read.
        sha256: returns the hex digest of the contents.
        stated: the configuration in the files, in their own format.
        notes: settings that are not read, one sentence each.
        metadata: of the header of the weights file.
    """

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    array: Callable[[str], np.ndarray]
    sha256: Callable[[], str]
    stated: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base_digest(self) -> str | None:
        """The base's digest in the header, which files of this package have; None if there is none."""
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(self.metadata[BASE])["digest"]
            return found if isinstance(found, str) and found else None
        return None


def stored_in_memory(
    name: str, tensors: Mapping[str, Any], config: Mapping[str, Any], notes: tuple[str, ...] = ()
) -> PeftView:
    """Wrap tensors in memory, such as a PEFT state dict: numpy, JAX or torch arrays by PEFT's names.

    Raises AdapterError if a value is not an array of a known dtype.
    """
    arrays = {key: as_numpy(value) for key, value in tensors.items()}
    for key, array in arrays.items():
        if array.dtype not in _DTYPE_NAMES:
            raise AdapterError(f"{name}: tensor {key!r} has dtype {array.dtype}; give arrays of numbers")
    entries = {key: Entry(_DTYPE_NAMES[array.dtype], array.shape, 0) for key, array in arrays.items()}
    return PeftView(Path(name), config, entries, arrays.__getitem__, lambda: _digest(arrays), config, notes)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the hex digest of all names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def as_numpy(value: Any) -> np.ndarray:
    """Return a numpy, JAX or torch array as numpy, in its own dtype."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import torch

    value = value.detach().cpu()
    # numpy itself has no bfloat16.
    half = value.dtype == torch.bfloat16
    return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if half else value.numpy()


@contextmanager
def as_adapter_errors() -> Iterator[None]:
    """Raise an AdapterError for each CheckpointError inside."""
    try:
        yield
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def check_names(path: Path, names: Mapping[str, object]) -> None:
    """Refuse a file with absurdly long tensor names with an AdapterError."""
    if (longest := max(map(len, names), default=0)) > _NAME_LIMIT:
        msg = f"{path}: a tensor's name has {longest} characters, at most {_NAME_LIMIT} are read"
        raise AdapterError(msg + ": the file is damaged")


def file_factors(
    name: str, factors: LoRAFactors, dtype: FileDtype, rank: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the two matrices of a module as a file stores them, with scale 1: b @ a is the update.

    The scale is folded into b. In float16 a power of two, which is exact, is moved between a and b so that their
    largest entries are about equal, and neither overflows while the other has room.

    They are a (rank, I) and b (O, rank), C-contiguous, padded with zeros up to `rank`, which changes no product. An
    OutputError names the module if shapes do not fit together, or values are not finite or do not fit the dtype.
    """
    a, b = np.shape(factors.a), np.shape(factors.b)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        msg = f"module {name!r} has a of shape {list(a)} and b of shape {list(b)}; they must be (K, I) "
        raise OutputError(msg + "and (O, K), without a 0")
    # float64 holds every product of a stored value and a scale without a second rounding.
    a = np.asarray(factors.a).astype(np.float64)
    with np.errstate(invalid="ignore"):  # Values that are not finite are refused below, with the module's name.
        b = np.asarray(factors.b).astype(np.float64) * factors.scale
    if dtype == "float16":
        a, b = _balanced(a, b)
    a, b = (file_matrix(name, matrix, dtype) for matrix in (a, b))
    extra = (rank or factors.rank) - a.shape[0]
    # safetensors 0.8 writes the bytes of an array in memory order and ignores strides.
    return np.ascontiguousarray(np.pad(a, ((0, extra), (0, 0)))), np.ascontiguousarray(np.pad(b, ((0, 0), (0, extra))))


def _balanced(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top_a, top_b = np.abs(a).max(), np.abs(b).max()
    if not (np.isfinite(top_a) and np.isfinite(top_b) and top_a > 0 and top_b > 0):
        return a, b
    shift = round((math.log2(top_b) - math.log2(top_a)) / 2)
    return np.ldexp(a, shift), np.ldexp(b, -shift)


def file_matrix(name: str, matrix: np.ndarray, dtype: FileDtype) -> np.ndarray:
    """Cast floats to the dtype of a file; an OutputError names the module if they are not finite or do not fit."""
    if not np.isfinite(matrix).all():
        msg = f"module {name!r} holds NaN or infinite values: nothing was written; check where they come from"
        raise OutputError(msg)
    with np.errstate(over="ignore", under="ignore"):
        cast = matrix.astype(_DTYPES[dtype])
        lost = np.linalg.norm(cast.astype(np.float64) - matrix)
    # Rounding loses 0.2 % at most; a larger loss is overflow, or values so small that float16 has few digits for them.
    if not lost <= 0.01 * np.linalg.norm(matrix):
        msg = f"module {name!r} has values up to {np.abs(matrix).max():.3g}, which do not fit {dtype}"
        raise OutputError(msg + ": write it in float32 or bfloat16")
    return cast


def exact_dtype(arrays: Sequence[np.ndarray], dtype: FileDtype) -> FileDtype:
    """Return `dtype` if it holds the arrays exactly, else float32."""
    with np.errstate(over="ignore", under="ignore"):
        exact = all((array.astype(_DTYPES[dtype]).astype(array.dtype) == array).all() for array in arrays)
    return dtype if exact else "float32"


def safetensors_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """Serialise tensors deterministically; safetensors itself varies the order of metadata."""
    data = safetensors.numpy.save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[start:]


@dataclass(frozen=True, eq=False)
class WriteRequest:
    """An adapter to write.

    Attributes:
        adapter: has modules as the base stores them (fused ones merged), in natural order.
        base: the model that it is for, if it is known.
        prefix: the prefix of module names in the base's class, see `class_module_name`.
        by_weight: the modules that peft adapts only if their weights are named, see `names.by_weight`.
        exclude: modules of the base without an update that share the ending of an updated one.
        magnitudes: float32 (O,) of each module if the adapter is a DoRA and `modules` its s B A; else None.
    """

    adapter: Adapter
    dtype: FileDtype = "float32"
    base: BaseInfo | None = None
    base_name: str | None = None
    prefix: str = TEXT
    by_weight: frozenset[str] = frozenset()
    exclude: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    magnitudes: Mapping[str, np.ndarray] | None = None

    @property
    def modules(self) -> Mapping[str, LoRAFactors]:
        """The updates of linear modules."""
        return self.adapter.modules

    def class_name(self, module: str) -> str:
        """Return the name that the base's class gives to a module."""
        return class_module_name(module, self.prefix)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(factors.rank for factors in self.modules.values())
