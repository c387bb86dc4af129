"""A read-only memory map of a file: arrays are views, and their pages can be given back to the system."""

import hashlib
import mmap
from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jcrosslora.errors import CheckpointError
from jcrosslora.utils.reading import regular_size

_CHUNK = 1 << 20
MAX_DIMS = 32  # numpy 1 held 32 dimensions, numpy 2 holds 64
_MAX_ELEMENTS = (1 << 63) // 16 - 1  # numpy counts bytes in 63 bits, and the widest dtype has 16


def is_array_shape(shape: Sequence[int]) -> bool:
    """Whether numpy can hold an array of this shape in any dtype; sizes of 0 count as 1."""
    return len(shape) <= MAX_DIMS and prod(max(size, 1) for size in shape) <= _MAX_ELEMENTS


class MappedFile:
    """One weight file.

    Attributes:
        path: its path.
        size: its length in bytes.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.size = regular_size(path)
        except OSError as error:
            msg = f"{path}: cannot be read ({error.strerror}): check that the file exists and is readable"
            raise CheckpointError(msg) from error

    @cached_property
    def buffer(self) -> mmap.mmap:
        """The file as a read-only buffer, of which only touched pages are resident."""
        if self.size == 0:
            msg = f"{self.path}: the file is empty: download it again"
            raise CheckpointError(msg)
        try:
            with self.path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            msg = f"{self.path}: cannot be read ({error.strerror}): check that the file is readable"
            raise CheckpointError(msg) from error

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
        digest = hashlib.sha256()
        try:
            with self.path.open("rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            msg = f"{self.path}: cannot be read ({error.strerror}): check that the file is readable"
            raise CheckpointError(msg) from error
        return digest.hexdigest()
