"""An entry of the cache on disk: its arrays, and the manifest that they are compared with on every read."""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_FORMAT = 2
MANIFEST = "manifest.json"
_MAX_BYTES = 1 << 24  # of a manifest; usual ones have a few thousand
_FOLDER = "arrays"

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]  # name of an array -> dtype and shape


@dataclass(frozen=True)
class Entry:
    """An entry on disk.

    Attributes:
        kind: of its content, such as "transport".
        key: a digest of everything that its content depends on.
        what: one line that describes the content; the reason in brackets if the manifest cannot be read.
        size: bytes of its files' contents.
        used: time of its last use, in seconds since 1970.
    """

    kind: str
    key: str
    path: Path
    what: str
    size: int
    used: float


@dataclass(frozen=True, eq=False)
class Loaded:
    """The content of an entry."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def read_entry(path: Path) -> Entry | None:
    """Return the entry in a folder KIND/KEY, without reading its arrays; None if there is none."""
    try:
        used = path.stat().st_mtime
        try:
            manifest = read_manifest(path)
            what, size, used = manifest.what, manifest.size, (path / MANIFEST).stat().st_mtime
        except Damaged as error:
            what = f"[{error}]"
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return None
    return Entry(path.parent.name, path.name, path, what, size, used)


class Damaged(Exception):
    """An entry differs from its manifest; the text says how."""


@dataclass(frozen=True)
class Manifest:
    """The record of an entry, for kind, key and what see `Entry`.

    Attributes:
        facts: JSON values that belong to the arrays.
        files: path within the entry -> (bytes, SHA-256).
        version: of the package that wrote it.
    """

    kind: str
    key: str
    what: str
    facts: Mapping[str, Any]
    arrays: Shapes
    files: Mapping[str, tuple[int, str]]
    version: str
    format: int = _FORMAT

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(size for size, _ in self.files.values())

    def write(self, folder: Path) -> None:
        """Write the record into the entry's folder."""
        (folder / MANIFEST).write_bytes(_encode(asdict(self)))


def read_manifest(folder: Path) -> Manifest:
    """Read the record of the entry in a folder KIND/KEY, but not its files.

    Raises FileNotFoundError if there is no entry, OSError if it cannot be read at the moment, and Damaged if it was
    changed after writing, or belongs to another entry.
    """
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        with (folder / MANIFEST).open("rb") as file:
            content = file.read(_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged("its manifest is missing") from None
    try:
        record = json.loads(content)
        intact = content == _encode({name: value for name, value in record.items() if name != "sha256"})
        arrays = {name: (dtype, tuple(shape)) for name, (dtype, shape) in record["arrays"].items()}
        files = {path: (size, digest) for path, (size, digest) in record["files"].items()}
        fields = {name: record[name] for name in ("kind", "key", "what", "facts", "version", "format")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, arrays, files, fields = False, {}, {}, {}
    if not intact:
        raise Damaged("its manifest was changed after writing")
    if (fields["kind"], fields["key"]) != (folder.parent.name, folder.name):
        raise Damaged("its manifest belongs to another entry")
    if fields["format"] != _FORMAT:
        raise Damaged("it was written by another version")
    return Manifest(arrays=arrays, files=files, **fields)


def measure_files(folder: Path, known: Mapping[str, tuple[int, str]] | None = None) -> dict[str, tuple[int, str]]:
    """Return path -> (bytes, SHA-256) of every file of an entry but the manifest, sorted by path.

    Values in `known` are not measured again.
    """
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / MANIFEST)
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    given = {name: measured for name, measured in (known or {}).items() if name in found}
    # hashlib releases the GIL.
    with ThreadPoolExecutor(4) as pool:
        rest = {name: pool.submit(_measure, path) for name, path in found.items() if name not in given}
    return {name: given[name] if name in given else rest[name].result() for name in found}


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every byte of an entry with its manifest.

    Raises OSError if a file cannot be read at the moment, or the entry is being removed; Damaged if a file is missing,
    unexpected, or was changed after writing.
    """
    found = measure_files(folder)
    for path in sorted(found.keys() | manifest.files.keys()):
        if found.get(path) != manifest.files.get(path):
            state = "missing" if path not in found else "unexpected" if path not in manifest.files else "damaged"
            raise Damaged(f"its file {path} is {state}")


def _measure(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _encode(record: Mapping[str, Any]) -> bytes:
    """Encode a record in its only valid form, with the digest of the rest, so that any changed byte shows."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, "sha256": digest}, sort_keys=True, indent=1).encode()


def file_of(name: str) -> str:
    """Return the path of an array within its entry."""
    return f"{_FOLDER}/{name}"


def write_arrays(folder: Path, arrays: Mapping[str, ArrayLike], written: Mapping[str, Path]) -> Shapes:
    """Write the bytes of each array into a file in the folder of an entry, and return their shapes.

    Arrays whose bytes another entry has already, in the file that `written` names, become links to that file.

    Raises OSError if they cannot be written.
    """
    (folder / _FOLDER).mkdir()
    held = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in held.items():
        if name in written:
            with suppress(OSError):  # the other entry is gone, or the file system has no links
                os.link(written[name], folder / file_of(name))
                continue
        array.tofile(folder / file_of(name))  # without a copy
    return {name: (array.dtype.name, array.shape) for name, array in held.items()}


def read_arrays(folder: Path, shapes: Shapes) -> dict[str, np.ndarray]:
    """Read the arrays that `write_arrays` wrote, of the shapes that it returned, or raise OSError or ValueError."""
    arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in shapes.items()}
    for name, array in arrays.items():
        with (folder / file_of(name)).open("rb") as file:
            read = file.readinto(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        if read != array.nbytes:
            raise ValueError(f"array {name} has {read} bytes instead of {array.nbytes}")
    return arrays
