"""The interface of checkpoint formats (tensors by name), and the memory-mapped and JSON files of a model."""

import hashlib
import json
import math
import mmap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from jcrosslora.errors import CheckpointError
from jcrosslora.utils.files import read_small_text, regular_size


class TensorStore:
    """Named tensors of one checkpoint, read on demand.

    Attributes:
        advice: what to do if the tensors do not fit the configuration.
        files: the weight files, in index order; none in memory.
    """

    advice = "download it again"
    files: tuple[Path, ...] = ()

    def names(self) -> list[str]:
        """Return the Hugging Face names of the tensors."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        raise NotImplementedError

    def dtype(self, name: str) -> str:
        """Return the storage dtype as the checkpoint states it, e.g. "BF16" or "Q4_K"."""
        raise NotImplementedError

    def tensor(self, name: str) -> np.ndarray:
        """Read a tensor: float32 if it is quantised, else a read-only view in the stored dtype."""
        raise NotImplementedError

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Read only these rows of a matrix, as float32 (n, columns); in a stack, rows are numbered throughout."""
        array = self.tensor(name)
        return array.reshape(-1, array.shape[-1])[ids].astype(np.float32)

    def release(self) -> None:
        """Give the resident pages of memory maps back to the system."""

    def sha256s(self) -> list[str]:
        """Return the hex digests of `files` in order; without files, one digest of the content.

        That one covers names, dtypes, shapes and numbers, and does not depend on the order or library of the arrays.
        """
        if self.files:
            return [MappedFile(path).sha256() for path in self.files]
        names = sorted(self.names())
        header = [[name, self.dtype(name), self.shape(name)] for name in names]
        digest = hashlib.sha256(json.dumps(header).encode())
        for name in names:
            digest.update(np.ascontiguousarray(self.tensor(name)).reshape(-1).view(np.uint8).data)
        return [digest.hexdigest()]


@dataclass(frozen=True)
class FileNames:
    """The mapping from tensor names in a checkpoint to names in the text model's class.

    Attributes:
        prefixes: prefix in the checkpoint -> prefix in the text model, e.g. {"language_model.": ""}; the first that
            matches applies, and tensors without any belong to another part. Empty for a checkpoint that is a text
            model.
        modules: see `StoredNames.modules`.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)

    def parts(self, stored: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Map each tensor name in the text model to the names in the checkpoint that hold its rows, in order."""
        found: dict[str, dict[int, str]] = {}
        for one in stored:
            name, place = self._named(one)
            if name is not None:
                found.setdefault(name, {})[place] = one
        return {name: tuple(held[place] for place in sorted(held)) for name, held in found.items()}

    def _named(self, stored: str) -> tuple[str | None, int]:
        """Return the name in the text model (None if outside it), and the index of its module in `modules`, or -1."""
        name = stored
        if self.prefixes:
            known = (old for old in self.prefixes if stored.startswith(old))
            if (prefix := next(known, None)) is None:
                return None, -1
            name = self.prefixes[prefix] + stored.removeprefix(prefix)
        pieces = name.split(".")
        module = ".".join(pieces[3:-1])
        if module not in self.modules:
            return name, -1
        return ".".join((*pieces[:3], self.modules[module], pieces[-1])), [*self.modules].index(module)


MAX_DIMS = 32  # numpy 1 held 32 dimensions, numpy 2 holds 64
_MAX_ELEMENTS = (1 << 63) // 16 - 1  # numpy counts bytes in 63 bits, and the widest dtype has 16


def is_array_shape(shape: Sequence[int]) -> bool:
    """Whether numpy can hold an array of this shape in any dtype; sizes of 0 count as 1."""
    return len(shape) <= MAX_DIMS and prod(max(size, 1) for size in shape) <= _MAX_ELEMENTS


class MappedFile:
    """One weight file; `size` is its length in bytes."""

    def __init__(self, path: Path):
        self.path = path
        with self._reading("exists and is readable"):
            self.size = regular_size(path)

    def refuse(self, what: str, cause: BaseException | None = None) -> NoReturn:
        """Raise a `CheckpointError` with the file's path and the problem."""
        raise CheckpointError(f"{self.path}: {what}") from cause

    def check_extent(self, name: str, stop: int) -> None:
        """Refuse a tensor that ends after the end of the file."""
        if stop > self.size:
            what = f"file has {self.size} bytes, header says {stop} or more (tensor {name!r}): download it again"
            self.refuse(what)

    @contextmanager
    def _reading(self, wanted: str = "is readable") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.refuse(f"cannot be read ({error.strerror}): check that the file {wanted}", error)

    @cached_property
    def buffer(self) -> mmap.mmap:
        """The file as a read-only buffer; only touched pages are resident."""
        if self.size == 0:
            self.refuse("the file is empty: download it again")
        with self._reading(), self.path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, dtype: npt.DTypeLike, shape: Sequence[int], offset: int) -> np.ndarray:
        """Return a read-only view of `shape` at byte `offset`, which the caller has checked to lie in the file."""
        count = prod(shape)
        if count == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self.buffer, dtype, count, offset).reshape(shape)

    def release(self) -> None:
        """Give the resident pages back to the system; views stay valid and are read again when touched."""
        if "buffer" in self.__dict__ and hasattr(mmap, "MADV_DONTNEED"):
            self.buffer.madvise(mmap.MADV_DONTNEED)

    def sha256(self) -> str:
        """Return the hex digest of the file, by plain reads that leave no pages of the map resident."""
        with self._reading(), self.path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def errors_of(where: Path | str) -> Iterator[None]:
    """Prefix CheckpointErrors with the name of a file or a base."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; raise CheckpointError if it cannot be read."""
    try:
        value = json.loads(read_small_text(path))
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}): check that the file exists and is readable"
        raise CheckpointError(msg) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: download the file again") from error
    if not isinstance(value, dict):
        msg = f"{path}: holds {type(value).__name__} where a JSON object was expected: download the file again"
        raise CheckpointError(msg)
    return value


def refuse_not_finite(values: Mapping[str, Any], *, but: Collection[str] = ()) -> None:
    """Raise CheckpointError with the key of an infinite or NaN number, which Python's JSON reads, except `but`."""
    stack = [(key, value) for key, value in values.items() if key not in but]
    while stack:
        key, value = stack.pop()
        if isinstance(value, float) and not math.isfinite(value):
            msg = f"config key {key!r} is {value}, expected a finite number: mend it, or download the file again"
            raise CheckpointError(msg)
        if isinstance(value, Mapping):
            stack += [(f"{key}.{name}", item) for name, item in value.items()]
        elif isinstance(value, list):
            stack += [(key, item) for item in value]
