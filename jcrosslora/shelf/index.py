"""The index of a shelf on disk: `shelf.json`, and segments of adapters with the vectors of their samples.

A segment holds up to 256 adapters in two files, NUMBER.json and NUMBER.safetensors. A change first writes new segments,
then replaces `shelf.json`, which lists the segments in use, and finally removes the old ones. So readers always see the
index before or after a change, even if the process is killed. A lock allows one change at a time. `shelf.json` contains
the digests of the segments' files and of its own content ("sha256"), so that a changed byte is noticed.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jcrosslora.errors import OutputError, UsageError
from jcrosslora.shelf.records import ShelfBase, ShelfEntry
from jcrosslora.utils import version
from jcrosslora.utils.files import read_file, read_small, write_whole
from jcrosslora.utils.unfinished import locked

HEAD, SEGMENTS = "shelf.json", "segments"
SEGMENT = 256  # adapters; the last segment is written again with each change
_FORMAT = 1
_VECTORS, _SEAL = "samples", "sha256"
Fresh = Sequence[tuple[ShelfEntry, np.ndarray]]  # entries with the vectors (samples, D) of their samples
T = TypeVar("T")


class ChangedMeanwhileError(UsageError):
    """Another process has changed the shelf since it was opened."""


@dataclass(frozen=True)
class Head:
    """The content of `shelf.json`.

    Attributes:
        version: of the package that wrote it.
        segments: numbers of the segments, in order.
        digests: SHA-256 (hex) of the segments' files, by file name.
    """

    format: int
    version: str
    base: ShelfBase
    encoder: str
    segments: tuple[int, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)


class Index:
    """The index of one shelf: its head, and the entries of each segment as `parts`."""

    def __init__(self, folder: Path, head: Head, parts: Sequence[Sequence[ShelfEntry]]) -> None:
        self.folder, self.head, self.parts = folder, head, tuple(map(tuple, parts))
        self._checked: set[int] = set()  # segments whose vectors were compared with their digest once

    @property
    def entries(self) -> tuple[ShelfEntry, ...]:
        """Return all entries, in the order of the segments."""
        return tuple(entry for part in self.parts for entry in part)

    @classmethod
    def create(cls, folder: Path, base: ShelfBase, encoder: str) -> "Index":
        """Write an empty index, or open the one that another process has just written.

        Raises OutputError if the folder holds something else, or cannot be written to.
        """
        try:
            # A creation that was stopped leaves the folder of segments, or a part of the head.
            others = folder.exists() and any(
                path.name not in (SEGMENTS, HEAD) and not path.name.startswith(f".{HEAD}.") for path in folder.iterdir()
            )
            if others and not (folder / HEAD).exists():
                raise OutputError(f"{folder}: holds files but no {HEAD}: give a new folder for the shelf")
            (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
            with locked(folder / SEGMENTS):
                if not (folder / HEAD).exists():
                    _write_head(folder, Head(_FORMAT, version(), base, encoder))
        except OSError as error:
            raise _not_written(folder, error) from error
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "Index":
        """Read the head and all entries, without vectors; raise UsageError if there is no shelf, or a damaged one."""
        if not (folder / HEAD).is_file():
            msg = f"{folder}: is no shelf, it has no {HEAD}: make one with `jcrosslora shelf add {folder} --base BASE "
            raise UsageError(msg + "ADAPTER ...`")
        while True:
            head = _read_head(folder)
            try:
                return cls(folder, head, [_read_entries(folder, number, head.digests) for number in head.segments])
            except UsageError:
                # Another process may have replaced the segments since the head was read.
                if _read_head(folder) == head:
                    raise

    def blocks(self) -> Iterator[tuple[Sequence[ShelfEntry], np.ndarray]]:
        """Yield the entries of each segment with the vectors (S, D) of all their samples, in order, as float32.

        Raises ChangedMeanwhileError or, for a missing or damaged file, UsageError.
        """
        for number, part in zip(self.head.segments, self.parts, strict=True):
            if part:
                yield part, self._vectors(number, part)

    def change(self, fresh: Fresh, removed: Collection[str] = ()) -> "Index":
        """Add entries, replacing entries of the same name, and remove others by name.

        Changes that other processes made are kept. Raises UsageError if the index is damaged, OutputError if the folder
        cannot be written to, or another process has put another adapter of one of these names there or has replaced the
        shelf.
        """
        try:
            with locked(self.folder / SEGMENTS):
                now = self if _read_head(self.folder) == self.head else self._reopened(fresh)
                return now._changed(fresh, {*removed, *(entry.name for entry, _ in fresh)})
        except OSError as error:
            raise _not_written(self.folder, error) from error

    def _reopened(self, fresh: Fresh) -> "Index":
        """Read what another process has made of the index."""
        now = Index.open(self.folder)
        old, new = ({entry.name: entry.place for entry in index.entries} for index in (self, now))
        clash = [one.name for one, _ in fresh if new.get(one.name, one.place) not in (one.place, old.get(one.name))]
        if clash or (now.head.base.digest, now.head.encoder) != (self.head.base.digest, self.head.encoder):
            what = f"put another adapter {clash[0]!r} on the shelf" if clash else "put another shelf there"
            msg = f"{self.folder}: another process has {what} meanwhile: look at `jcrosslora shelf list`, and try again"
            raise OutputError(msg)
        return now

    def _changed(self, fresh: Fresh, left_out: Collection[str]) -> "Index":
        kept, items, digests = [], [], {}
        for number, part in zip(self.head.segments, self.parts, strict=True):
            open_ended = number == self.head.segments[-1] and len(part) < SEGMENT
            if not open_ended and all(entry.name not in left_out for entry in part):
                kept.append((number, part))
                names = (_path(self.folder, number, ending).name for ending in ("safetensors", "json"))
                digests |= {name: self.head.digests.get(name, "") for name in names}
                continue
            split = split_samples(self._vectors(number, part), part)
            items += [(one, vectors) for one, vectors in zip(part, split, strict=True) if one.name not in left_out]
        items += fresh
        new = max(self.head.segments, default=0)
        for start in range(0, max(len(items), 1), SEGMENT):
            # If all entries are removed, an empty segment keeps its number from being used again.
            new += 1
            chunk = items[start : start + SEGMENT]
            digests |= _write_segment(self.folder, new, chunk)
            kept.append((new, tuple(entry for entry, _ in chunk)))
        numbers, parts = zip(*kept, strict=True)
        made = Index(self.folder, replace(self.head, segments=numbers, digests=digests, version=version()), parts)
        _write_head(made.folder, made.head)
        used = {f"{number:06d}" for number in numbers}
        with suppress(OSError):  # a file that cannot be removed stays, and no head names it
            for path in (self.folder / SEGMENTS).iterdir():
                if path.stem not in used:
                    path.unlink()
        return made

    def _vectors(self, number: int, part: Sequence[ShelfEntry]) -> np.ndarray:
        try:
            found = _read_vectors(self.folder, number, part, None if number in self._checked else self.head.digests)
        except UsageError as error:
            if _read_head(self.folder) == self.head:
                raise
            msg = f"{self.folder}: another process has changed the shelf since it was opened: open it again"
            raise ChangedMeanwhileError(msg) from error
        self._checked.add(number)
        return found


def split_samples(vectors: np.ndarray, entries: Sequence[ShelfEntry]) -> list[np.ndarray]:
    """Split the vectors of a block by entry."""
    return np.split(vectors, np.cumsum([len(entry.samples) for entry in entries])[:-1]) if entries else []


def _read_head(folder: Path) -> Head:
    """Read `shelf.json`; raise UsageError if it cannot be read, was changed after writing, or has another format."""
    path = folder / HEAD
    content = _read(path)
    record = _decode(path, content, dict[str, Any])
    if isinstance(stated := record.get("format"), int) and stated != _FORMAT:
        msg = f"{folder}: is a shelf of format {stated}, expected format {_FORMAT}: use the version of jcrosslora "
        raise UsageError(msg + f"that wrote it ({record.get('version', 'unknown')}), or make a new shelf")
    if record.pop(_SEAL, None) != _digest(_encode(record)):
        raise _damaged(path, "it was changed after writing")
    return _decode(path, content, Head)


def _write_head(folder: Path, head: Head) -> None:
    record = msgspec.to_builtins(head)
    content = _encode(record | {_SEAL: _digest(_encode(record))})
    write_whole(folder / HEAD, msgspec.json.format(content, indent=1), sync=True)


def _read_entries(folder: Path, number: int, digests: Mapping[str, str]) -> tuple[ShelfEntry, ...]:
    """Read the entries of a segment; raise UsageError if the file is missing, damaged, or has another digest."""
    path = _path(folder, number, "json")
    return _decode(path, _intact(path, digests), tuple[ShelfEntry, ...])


def _read_vectors(
    folder: Path, number: int, entries: Sequence[ShelfEntry], digests: Mapping[str, str] | None
) -> np.ndarray:
    """Read the vectors (S, D) of all samples of a segment's entries, in order, as float32; see `_read_entries`."""
    path = _path(folder, number, "safetensors")
    wanted = sum(len(entry.samples) for entry in entries)
    try:
        found = load(_intact(path, digests)).get(_VECTORS)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if found is None or found.ndim != 2 or len(found) != wanted:
        raise _damaged(path, f"has no vectors of {wanted} samples")
    return found.astype(np.float32)


def _write_segment(folder: Path, number: int, items: Fresh) -> dict[str, str]:
    """Write entries and vectors, as float16; return the digests of the files."""
    width = max((each.shape[1] for _, each in items), default=0)
    vectors = [np.zeros((0, width), np.float32), *(each for _, each in items if len(each))]
    contents = {
        "safetensors": save({_VECTORS: np.concatenate(vectors).astype(np.float16)}),
        "json": _encode([entry for entry, _ in items]),
    }
    for ending, content in contents.items():
        write_whole(_path(folder, number, ending), content, sync=True)
    return {_path(folder, number, ending).name: _digest(content) for ending, content in contents.items()}


def _read(path: Path) -> bytes:
    try:
        return read_small(path) if path.name == HEAD else read_file(path)
    except OSError as error:
        raise _damaged(path, error.strerror or "cannot be read") from error


def _intact(path: Path, digests: Mapping[str, str] | None) -> bytes:
    """Read a file; with `digests`, raise UsageError if its own is not among them."""
    content = _read(path)
    if digests is not None and digests.get(path.name) != _digest(content):
        raise _damaged(path, "it was changed after writing")
    return content


def _decode(path: Path, content: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error


def _encode(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _path(folder: Path, number: int, ending: str) -> Path:
    return folder / SEGMENTS / f"{number:06d}.{ending}"


def _damaged(path: Path, reason: str) -> UsageError:
    msg = f"{path}: the index of the shelf is damaged ({reason}): make the shelf again in a new folder, with "
    return UsageError(msg + "`jcrosslora shelf add NEW --base BASE ADAPTER ...`")


def _not_written(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"{folder}: cannot be written ({error.strerror or error}): make it writable, or free space")
