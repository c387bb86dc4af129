"""The files of a shelf's index: `shelf.json`, and a segment of adapters in NUMBER.json and NUMBER.safetensors.

`shelf.json` has the digests of the segments' files and, as "sha256", of the rest of itself, so that a changed byte is
noticed when it is read. An index of an earlier version has none, and gets them with its next change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jcrosslora.errors import OutputError, UsageError
from jcrosslora.shelf.records import ShelfBase, ShelfEntry
from jcrosslora.utils.files import read_file, read_small, write_whole

HEAD, SEGMENTS = "shelf.json", "segments"
FORMAT = 1
_VECTORS = "samples"
_SEAL = "sha256"
T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """The content of `shelf.json`.

    Attributes:
        version: of the package that wrote it.
        encoder: of the samples.
        segments: numbers of the segments, in order.
        digests: SHA-256 (hex) of the segments' files, by file name.
    """

    format: int
    version: str
    base: ShelfBase
    encoder: str
    segments: tuple[int, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stated:
    """What a `shelf.json` of any format states."""

    format: int
    version: str = "unknown"


def read_head(folder: Path) -> Head:
    """Read `shelf.json`; raise UsageError if it cannot be read, was changed after writing, or has another format."""
    path = folder / HEAD
    content = _read(path)
    stated = _decode(path, content, _Stated)
    if stated.format != FORMAT:
        msg = f"{folder}: is a shelf of format {stated.format}, format {FORMAT} was wanted: use the version of "
        raise UsageError(msg + f"jcrosslora that wrote it ({stated.version}), or make a new shelf")
    record = _decode(path, content, dict[str, Any])
    seal = record.pop(_SEAL, None)
    if seal is not None and seal != _digest(_encode(record)):
        raise _damaged(path, "it was changed after writing")
    return _decode(path, content, Head)


def write_head(folder: Path, head: Head) -> None:
    """Replace `shelf.json`, or raise OSError."""
    record = msgspec.to_builtins(head)
    content = _encode(record | {_SEAL: _digest(_encode(record))})
    write_whole(folder / HEAD, msgspec.json.format(content, indent=1), sync=True)


def read_entries(folder: Path, number: int, digests: Mapping[str, str]) -> tuple[ShelfEntry, ...]:
    """Read the entries of a segment; raise UsageError if the file is missing, damaged, or has another digest."""
    path = _path(folder, number, "json")
    return _decode(path, _intact(path, digests), tuple[ShelfEntry, ...])


def read_vectors(folder: Path, number: int, entries: Sequence[ShelfEntry], digests: Mapping[str, str]) -> np.ndarray:
    """Read the vectors (S, D) of all samples of a segment's entries, in order, as float32; see `read_entries`."""
    path = _path(folder, number, "safetensors")
    wanted = sum(len(entry.samples) for entry in entries)
    try:
        found = load(_intact(path, digests)).get(_VECTORS)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if found is None or found.ndim != 2 or len(found) != wanted:
        raise _damaged(path, f"has no vectors of {wanted} samples")
    return found.astype(np.float32)


def write_segment(folder: Path, number: int, items: Sequence[tuple[ShelfEntry, np.ndarray]]) -> dict[str, str]:
    """Write entries with the vectors (samples, D) of their samples, as float16; return the digests of the files."""
    width = max((each.shape[1] for _, each in items), default=0)
    vectors = [np.zeros((0, width), np.float32), *(each for _, each in items if len(each))]
    joined = np.concatenate(vectors).astype(np.float16)
    digests = {}
    for ending, content in (
        ("safetensors", save({_VECTORS: joined})),
        ("json", _encode([entry for entry, _ in items])),
    ):
        path = _path(folder, number, ending)
        write_whole(path, content, sync=True)
        digests[path.name] = _digest(content)
    return digests


def segment_digests(folder: Path, number: int, known: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of a segment's files; compute those that are not known."""
    paths = [_path(folder, number, ending) for ending in ("safetensors", "json")]
    return {path.name: known.get(path.name) or _digest(_read(path)) for path in paths}


def remove_others(folder: Path, numbers: Collection[int]) -> None:
    """Remove the files of all segments except some; a file that cannot be removed stays, and no head names it."""
    used = {f"{number:06d}" for number in numbers}
    with suppress(OSError):
        for path in (folder / SEGMENTS).iterdir():
            if path.stem not in used:
                path.unlink()


def not_written(folder: Path, error: OSError) -> OutputError:
    """Make the error of a shelf that cannot be written."""
    return OutputError(f"{folder}: cannot be written ({error.strerror or error}): make it writable, or free space")


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _read(path: Path) -> bytes:
    try:
        return read_small(path) if path.name == HEAD else read_file(path)
    except OSError as error:
        raise _damaged(path, error.strerror or "cannot be read") from error


def _intact(path: Path, digests: Mapping[str, str]) -> bytes:
    content = _read(path)
    if path.name in digests and digests[path.name] != _digest(content):
        raise _damaged(path, "it was changed after writing")
    return content


def _decode(path: Path, content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _path(folder: Path, number: int, ending: str) -> Path:
    return folder / SEGMENTS / f"{number:06d}.{ending}"


def _damaged(path: Path, reason: str) -> UsageError:
    msg = f"{path}: the index of the shelf is damaged ({reason}): make the shelf again in a new folder, with "
    return UsageError(msg + "`jcrosslora shelf add NEW --base BASE ADAPTER ...`")
