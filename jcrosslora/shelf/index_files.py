"""The files of a shelf's index: `shelf.json`, and a segment of adapters in NUMBER.json and NUMBER.safetensors."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jcrosslora.errors import OutputError, UsageError
from jcrosslora.shelf.records import ShelfBase, ShelfEntry
from jcrosslora.utils.files import write_whole

HEAD, SEGMENTS = "shelf.json", "segments"
FORMAT = 1
_VECTORS = "samples"
T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """The content of `shelf.json`.

    Attributes:
        format: version of the form.
        version: of the package that wrote it.
        base: of all adapters.
        encoder: what made the vectors of the samples.
        segments: numbers of the segments, in order.
    """

    format: int
    version: str
    base: ShelfBase
    encoder: str
    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Stated:
    """What a `shelf.json` of any format states."""

    format: int
    version: str = "unknown"


def read_head(folder: Path) -> Head:
    """Read `shelf.json`.

    Raises:
        UsageError: it cannot be read, or is of another format.
    """
    path = folder / HEAD
    stated = _decode(path, _Stated)
    if stated.format != FORMAT:
        msg = f"{folder}: is a shelf of format {stated.format}, format {FORMAT} was wanted: use the version of "
        raise UsageError(msg + f"jcrosslora that wrote it ({stated.version}), or make a new shelf")
    return _decode(path, Head)


def write_head(folder: Path, head: Head) -> None:
    """Replace `shelf.json`.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(folder / HEAD, msgspec.json.format(_encode(head), indent=1), sync=True)


def read_entries(folder: Path, number: int) -> tuple[ShelfEntry, ...]:
    """Read the entries of a segment.

    Raises:
        UsageError: the file is missing or damaged.
    """
    return _decode(_path(folder, number, "json"), tuple[ShelfEntry, ...])


def read_vectors(folder: Path, number: int, entries: Sequence[ShelfEntry]) -> np.ndarray:
    """Read the vectors (S, D) of all samples of a segment's entries, in order, as float32.

    Raises:
        UsageError: the file is missing or damaged.
    """
    path = _path(folder, number, "safetensors")
    wanted = sum(len(entry.samples) for entry in entries)
    try:
        found = load_file(path).get(_VECTORS)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if found is None or found.ndim != 2 or len(found) != wanted:
        raise _damaged(path, f"has no vectors of {wanted} samples")
    return found.astype(np.float32)


def write_segment(folder: Path, number: int, items: Sequence[tuple[ShelfEntry, np.ndarray]]) -> None:
    """Write entries with the vectors (samples, D) of their samples, as float16.

    Raises:
        OSError: the files cannot be written.
    """
    width = max((own.shape[1] for _, own in items), default=0)
    vectors = [np.zeros((0, width), np.float32), *(own for _, own in items if len(own))]
    joined = np.concatenate(vectors).astype(np.float16)
    write_whole(_path(folder, number, "safetensors"), save({_VECTORS: joined}), sync=True)
    write_whole(_path(folder, number, "json"), _encode([entry for entry, _ in items]), sync=True)


def remove_others(folder: Path, numbers: Collection[int]) -> None:
    """Remove all files of segments but those of some numbers; what cannot be removed is named by no head."""
    used = {f"{number:06d}" for number in numbers}
    with suppress(OSError):
        for path in (folder / SEGMENTS).iterdir():
            if path.stem not in used:
                path.unlink()


def not_written(folder: Path, error: OSError) -> OutputError:
    """Make the error of a shelf that cannot be written."""
    return OutputError(f"{folder}: cannot be written ({error.strerror or error}): make it writable, or free space")


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value)


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise _damaged(path, error.strerror or "cannot be read") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error


def _path(folder: Path, number: int, ending: str) -> Path:
    return folder / SEGMENTS / f"{number:06d}.{ending}"


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path}: the index of the shelf is damaged ({reason}): make a new shelf, and add its adapters")
