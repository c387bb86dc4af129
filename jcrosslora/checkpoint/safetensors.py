"""One safetensors file: a checked header, tensors as views of a memory map, and writing in the memory of one block.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors#format). Each tensor is read with its own dtype and offsets, because a file
may mix dtypes.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jcrosslora.checkpoint.store import MAX_DIMS, MappedFile, is_array_shape

HEADER_LIMIT = 100_000_000  # bytes, as in the reference implementation

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in its file.

    Attributes:
        dtype: its name in the header, e.g. "BF16".
        start: first byte, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """A safetensors file with a checked header.

    Raises:
        CheckpointError: missing, truncated, or a header that does not describe the file.
    """

    def __init__(self, path: Path):
        self.file = MappedFile(path)
        header, data_start = _read_header(self.file)
        found = {
            name: _entry(self.file, name, raw, data_start) for name, raw in header.items() if name != "__metadata__"
        }
        _check_apart(self.file, found)
        self.entries = {name: entry for name, (entry, _) in found.items()}

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view in its stored dtype.

        Raises:
            CheckpointError: the tensor is not in the file, or has a dtype that is not supported.
        """
        entry = self.entries.get(name)
        if entry is None:
            self.file.refuse(f"tensor {name!r} is not in the file: download it again, or fix the index")
        if entry.dtype not in DTYPES:
            self.file.refuse(f"tensor {name!r} has dtype {entry.dtype!r}, which is not supported")
        return self.file.array(DTYPES[entry.dtype], entry.shape, entry.start)


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """Return the header and the byte at which the data begin."""
    if file.size < 8:
        file.refuse(f"{file.size} bytes are too few for a safetensors file: download it again")
    length = int.from_bytes(file.buffer[:8], "little")
    if length > HEADER_LIMIT:
        file.refuse(f"not a safetensors file (header length {length} is over {HEADER_LIMIT} bytes)")
    if 8 + length > file.size:
        file.refuse(f"file has {file.size} bytes, header says {8 + length} or more: download it again")
    try:
        header = json.loads(file.buffer[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        what = "the safetensors header is not valid JSON, or names a key twice: download the file again"
        file.refuse(what, error)
    if not isinstance(header, dict):
        file.refuse("the safetensors header is not a JSON object: download the file again")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object that names a key twice, because readers differ in which value they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        msg = "a name occurs twice"
        raise ValueError(msg)
    return found


def _entry(file: MappedFile, name: str, raw: Any, data_start: int) -> tuple[Entry, int]:
    """Return the entry of a tensor and the byte at which it ends."""
    fields = raw if isinstance(raw, dict) else {}
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        file.refuse(f"the header entry of {name!r} is malformed: download the file again")
    if len(shape) > MAX_DIMS:
        file.refuse(f"tensor {name!r} has {len(shape)} dimensions, at most {MAX_DIMS} can be read")
    entry, stop = Entry(dtype, tuple(shape), data_start + offsets[0]), data_start + offsets[1]
    file.check_extent(name, stop)
    wanted = prod(shape) * DTYPES[dtype].itemsize if dtype in DTYPES else None  # others are refused when they are read
    if wanted is not None and stop - entry.start != wanted:
        what = f"tensor {name!r} of shape {shape} and dtype {dtype} needs {wanted} bytes, header gives "
        file.refuse(what + f"{stop - entry.start}: the file is corrupt, download it again")
    if not is_array_shape(shape):
        file.refuse(f"tensor {name!r} has shape {shape}, which no memory holds: download the file again")
    return entry, stop


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_apart(file: MappedFile, found: Mapping[str, tuple[Entry, int]]) -> None:
    """Check that no byte belongs to two tensors, as the format demands."""
    taken, before = 0, ""
    for start, stop, name in sorted((entry.start, stop, name) for name, (entry, stop) in found.items()):
        if start < taken and start < stop:
            file.refuse(f"tensors {before!r} and {name!r} share bytes: the file is corrupt, download it again")
        if stop > taken:
            taken, before = stop, name


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor to be written.

    Attributes:
        dtype: its name in the header, e.g. "BF16".
        blocks: yields its rows in order as arrays of that dtype; called once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """Number of its bytes."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write_pieces(
    path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str], written: Callable[[int], object]
) -> None:
    """Write a safetensors file; `written` is called with the number of bytes after each block.

    Wider dtypes come first in the file, so that every tensor is aligned to its items.

    Raises:
        OSError: it cannot be written.
    """
    pieces = sorted(pieces, key=lambda piece: -DTYPES[piece.dtype].itemsize)
    with path.open("wb") as file:
        file.write(_header(pieces, metadata))
        for piece in pieces:
            left = piece.size
            for block in piece.blocks():
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                file.write(data)
                left -= data.nbytes
                written(data.nbytes)
            assert left == 0, f"{piece.name}: {left} bytes of {piece.size} are missing"


def _header(pieces: Iterable[Piece], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for piece in pieces:
        offsets = [start, start + piece.size]
        entries[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
