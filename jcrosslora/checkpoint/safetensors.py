"""Safetensors: files with checked headers, tensors as views of a memory map, folders of shards, and writing by block.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data
(https://github.com/huggingface/safetensors#format). Each tensor is read with its own dtype and offsets, because a file
may mix dtypes. A folder holds the files that `model.safetensors.index.json` names, else `model.safetensors`: other
`*.safetensors` in a repository (Mistral's `consolidated.safetensors`, adapters) are not part of the model.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jcrosslora.checkpoint.store import (
    MAX_DIMS,
    FileNames,
    MappedFile,
    TensorStore,
    is_array_shape,
    read_json_object,
)
from jcrosslora.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
DTYPE_CODES = {dtype.name: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """The location of a tensor in its file.

    Attributes:
        dtype: its name in the header, e.g. "BF16".
        start: first byte, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int


class SafetensorsFile:
    """A safetensors file with a checked header.

    Raises CheckpointError if it is missing, truncated, or its header does not describe it.
    """

    def __init__(self, path: Path):
        self.file = MappedFile(path)
        header, data_start = _read_header(self.file)
        found = {
            name: _entry(self.file, name, raw, data_start) for name, raw in header.items() if name != "__metadata__"
        }
        _check_apart(self.file, found)
        self.entries = {name: entry for name, (entry, _) in found.items()}
        stated = header.get("__metadata__")
        self.metadata: Mapping[str, Any] = stated if isinstance(stated, dict) else {}

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as a read-only view in its stored dtype.

        Raises CheckpointError if the tensor is not in the file, or has a dtype that is not supported.
        """
        entry = self.entries.get(name)
        if entry is None:
            self.file.refuse(f"tensor {name!r} is not in the file: download it again, or fix the index")
        if entry.dtype not in DTYPES:
            self.file.refuse(f"tensor {name!r} has dtype {entry.dtype!r}, which is not supported")
        return self.file.array(DTYPES[entry.dtype], entry.shape, entry.start)


class ShardedStore(TensorStore):
    """The tensors of a folder; a shard is opened when one of its tensors is read.

    Raises CheckpointError if there is neither index nor single file, or the index is invalid.
    """

    def __init__(self, folder: Path, names: FileNames | None = None):
        self.folder = folder
        self._shards: dict[str, SafetensorsFile] = {}
        weight_map = self._weight_map()
        parts = (names or FileNames()).parts(weight_map)
        # Name in the model -> shard and stored name of each part that holds its rows.
        self._places = {name: [(weight_map[stored], stored) for stored in held] for name, held in parts.items()}
        shards = dict.fromkeys(shard for held in self._places.values() for shard, _ in held)
        self.files = tuple(folder / shard for shard in shards)

    def _weight_map(self) -> dict[str, str]:
        if (self.folder / INDEX).exists():
            return read_weight_map(self.folder / INDEX)
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._shard(SINGLE).entries, SINGLE)
        wanted = f"{self.folder}: has neither {INDEX} nor {SINGLE}"
        if any(self.folder.glob("pytorch_model*.bin*")):
            msg = f"{wanted}, only pickle files (pytorch_model*.bin), which can run code when loaded: convert them "
            raise CheckpointError(msg + "with transformers' save_pretrained")
        if (found := next(self.folder.glob("*.gguf"), None)) is not None:
            raise CheckpointError(f"{wanted}: to read the GGUF file, give its path ({found})")
        raise CheckpointError(f"{wanted}: give the folder of a base model saved as safetensors")

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._shards:
            self._shards[name] = SafetensorsFile(self.folder / name)
        return self._shards[name]

    def _located(self, name: str) -> list[tuple[SafetensorsFile, str]]:
        if name not in self._places:
            raise CheckpointError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        found = [(self._shard(shard), stored) for shard, stored in self._places[name]]
        for opened, stored in found:
            if stored not in opened.entries:
                what = f"the index places tensor {stored!r} here, but the file does not hold it: download the shard "
                opened.file.refuse(what + "and the index again")
        return found

    def _entries(self, name: str) -> list[Entry]:
        return [file.entries[stored] for file, stored in self._located(name)]

    def names(self) -> list[str]:
        return list(self._places)

    def stored(self) -> Iterator[tuple[str, SafetensorsFile, dict[str, str | None]]]:
        """Yield each shard: its name, the file, and a map from each name in the file to the name in the model.

        The name in the model is None for a tensor outside the text model; `names` omits those.
        """
        names = {place: name for name, held in self._places.items() for place in held}
        for shard in dict.fromkeys(self._weight_map().values()):
            file = self._shard(shard)
            yield shard, file, {stored: names.get((shard, stored)) for stored in file.entries}

    def rows_held(self, name: str, stored: str) -> slice:
        """Return which rows of a model's tensor the stored tensor holds; usually all of them."""
        first = 0
        for (_, own), entry in zip(self._places[name], self._entries(name), strict=True):
            if own == stored:
                return slice(first, first + entry.shape[0]) if entry.shape else slice(None)
            first += entry.shape[0]
        raise CheckpointError(f"{self.folder}: {stored!r} is no part of {name!r}")

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [entry.shape for entry in self._entries(name)]
        whole = len(shapes) > 1 and all(shape and shape[1:] == shapes[0][1:] for shape in shapes)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if whole else shapes[0]

    def dtype(self, name: str) -> str:
        """Storage dtype, e.g. "BF16"."""
        return self._entries(name)[0].dtype

    def tensor(self, name: str) -> np.ndarray:
        """Return a read-only view in the stored dtype, or a copy if the tensor is stored in parts."""
        arrays = [file.array(stored) for file, stored in self._located(name)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def release(self) -> None:
        for shard in self._shards.values():
            shard.file.release()


def read_weight_map(index: Path) -> dict[str, str]:
    """Read an index's map from tensor name to shard file; raise CheckpointError for an entry outside the folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no 'weight_map' with tensors: download the index again")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors")
        if not plain or any(mark in shard for mark in ("/", "\\", ":", "\0")):
            msg = f"{index}: tensor {name!r} is placed in {shard!r}, which is not a *.safetensors file of the folder"
            raise CheckpointError(msg)
    return weight_map


def shards_of(weight_map: Mapping[str, str], names: FileNames) -> list[str]:
    """List the shards that hold tensors of the model, in index order; arguments as in `ShardedStore`."""
    return list(dict.fromkeys(weight_map[stored] for held in names.parts(weight_map).values() for stored in held))


def _read_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    """Return the header and the byte offset of the data."""
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
        raise ValueError("a name occurs twice")
    return found


def _entry(file: MappedFile, name: str, raw: Any, data_start: int) -> tuple[Entry, int]:
    """Return the entry of a tensor and its end offset in bytes."""
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
    """Check that no byte belongs to two tensors, as the format requires."""
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

    Wider dtypes come first in the file, so that every tensor is aligned to its items. Raises OSError if it cannot be
    written.
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
