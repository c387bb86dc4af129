"""The index of a shelf on disk: `shelf.json`, and segments of adapters with the vectors of their samples.

A segment holds up to 256 adapters in two files, NUMBER.json and NUMBER.safetensors. A change writes new segments
first, then replaces `shelf.json`, which names the segments in use, and at last removes the old ones: a reader, or a
process that is stopped at any moment, sees the index before or after the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from jcrosslora.errors import OutputError, UsageError
from jcrosslora.shelf.records import ShelfBase, ShelfEntry
from jcrosslora.utils.files import write_whole

HEAD, _FOLDER = "shelf.json", "segments"
FORMAT = 1
SEGMENT = 256  # adapters; the last segment is written again with each change
_ATTEMPTS = 3  # of a reader, while another process replaces segments
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


class Index:
    """The index of one shelf.

    Attributes:
        folder: of the shelf.
        head: its head.
        parts: the entries of each segment.
    """

    def __init__(self, folder: Path, head: Head, parts: Sequence[Sequence[ShelfEntry]]) -> None:
        self.folder, self.head, self.parts = folder, head, tuple(map(tuple, parts))

    @property
    def entries(self) -> tuple[ShelfEntry, ...]:
        """Return all entries, in the order of the segments."""
        return tuple(entry for part in self.parts for entry in part)

    @classmethod
    def create(cls, folder: Path, base: ShelfBase, encoder: str) -> Index:
        """Write an empty index.

        Raises:
            OutputError: the folder holds something else, or cannot be written to.
        """
        try:
            if folder.exists() and any(folder.iterdir()):
                msg = f"{folder}: holds files but no {HEAD}: give a new folder for the shelf"
                raise OutputError(msg)
            (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_written(folder, error) from error
        made = cls(folder, Head(FORMAT, version("jcrosslora"), base, encoder), ())
        made._write_head(made.head)
        return made

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Read the head and all entries, without vectors.

        Raises:
            UsageError: there is no shelf, it is damaged, or of another version.
        """
        if not (folder / HEAD).is_file():
            msg = f"{folder}: is no shelf, it has no {HEAD}: make one with `jcrosslora shelf add {folder} --base BASE "
            raise UsageError(msg + "ADAPTER ...`")
        for attempt in range(_ATTEMPTS):
            head = _decode(folder / HEAD, Head)
            if head.format != FORMAT:
                msg = f"{folder}: is a shelf of format {head.format}, format {FORMAT} was wanted: use the version of "
                raise UsageError(msg + f"jcrosslora that wrote it ({head.version}), or make a new shelf")
            try:
                return cls(folder, head, [_decode(_path(folder, n, "json"), list[ShelfEntry]) for n in head.segments])
            except UsageError:
                # Another process may have replaced the segments since the head was read.
                if attempt + 1 == _ATTEMPTS or _decode(folder / HEAD, Head) == head:
                    raise
        raise AssertionError

    def blocks(self) -> Iterator[tuple[Sequence[ShelfEntry], np.ndarray]]:
        """Yield the entries of each segment with the vectors (S, D) of all their samples, in order, as float32.

        Raises:
            UsageError: a file is missing or damaged.
        """
        for number, part in zip(self.head.segments, self.parts, strict=True):
            yield part, self._vectors(number, part)

    def change(self, fresh: Sequence[tuple[ShelfEntry, np.ndarray]]) -> Index:
        """Put entries with the vectors (samples, D) of their samples on the shelf, and replace those of equal names.

        Raises:
            OutputError: the folder cannot be written to, or another process has changed the shelf meanwhile.
        """
        if _decode(self.folder / HEAD, Head) != self.head:
            msg = f"{self.folder}: another process has changed the shelf meanwhile: run the same command again"
            raise OutputError(msg)
        names = {entry.name for entry, _ in fresh}
        kept, old, items = [], [], []
        for number, part in zip(self.head.segments, self.parts, strict=True):
            open_ended = number == self.head.segments[-1] and len(part) < SEGMENT
            if not open_ended and names.isdisjoint(entry.name for entry in part):
                kept.append((number, part))
                continue
            old.append(number)
            split = split_samples(self._vectors(number, part), part)
            items += [(one, own) for one, own in zip(part, split, strict=True) if one.name not in names]
        items += fresh
        new = max(self.head.segments, default=0)
        try:
            for start in range(0, len(items), SEGMENT):
                new += 1
                chunk = items[start : start + SEGMENT]
                self._write_segment(new, chunk)
                kept.append((new, tuple(entry for entry, _ in chunk)))
        except OSError as error:
            raise _not_written(self.folder, error) from error
        numbers, parts = zip(*kept, strict=True) if kept else ((), ())
        head = replace(self.head, segments=numbers, version=version("jcrosslora"))
        self._write_head(head)
        for number in old:
            for ending in ("json", "safetensors"):
                with suppress(OSError):  # left over, and named by no head
                    _path(self.folder, number, ending).unlink()
        return Index(self.folder, head, parts)

    def _vectors(self, number: int, entries: Sequence[ShelfEntry]) -> np.ndarray:
        path = _path(self.folder, number, "safetensors")
        wanted = sum(len(entry.samples) for entry in entries)
        try:
            found = load_file(path).get(_VECTORS)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error)) from error
        if found is None or found.ndim != 2 or len(found) != wanted:
            raise _damaged(path, f"has no vectors of {wanted} samples")
        return found.astype(np.float32)

    def _write_segment(self, number: int, items: Sequence[tuple[ShelfEntry, np.ndarray]]) -> None:
        width = max((own.shape[1] for _, own in items), default=0)
        vectors = [own if len(own) else np.zeros((0, width), np.float32) for _, own in items]
        joined = np.concatenate(vectors).astype(np.float16)
        write_whole(_path(self.folder, number, "safetensors"), save({_VECTORS: joined}), sync=True)
        write_whole(_path(self.folder, number, "json"), _encode([entry for entry, _ in items]), sync=True)

    def _write_head(self, head: Head) -> None:
        try:
            write_whole(self.folder / HEAD, msgspec.json.format(_encode(head), indent=1), sync=True)
        except OSError as error:
            raise _not_written(self.folder, error) from error


def split_samples(vectors: np.ndarray, entries: Sequence[ShelfEntry]) -> list[np.ndarray]:
    """Split the vectors of a block by entry."""
    return np.split(vectors, np.cumsum([len(entry.samples) for entry in entries])[:-1]) if entries else []


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
    return folder / _FOLDER / f"{number:06d}.{ending}"


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path}: the index of the shelf is damaged ({reason}): make a new shelf, and add its adapters")


def _not_written(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder}: cannot be written ({error.strerror or error}): make it writable, or free space")
