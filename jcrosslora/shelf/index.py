"""The index of a shelf on disk: `shelf.json`, and segments of adapters with the vectors of their samples.

A segment holds up to 256 adapters in two files, NUMBER.json and NUMBER.safetensors. A change writes new segments
first, then replaces `shelf.json`, which names the segments in use, and at last removes the others: a reader, or a
process that is stopped at any moment, sees the index before or after the change. Processes change it one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jcrosslora.errors import OutputError, UsageError
from jcrosslora.shelf.index_files import (
    FORMAT,
    HEAD,
    SEGMENTS,
    Head,
    not_written,
    read_entries,
    read_head,
    read_vectors,
    remove_others,
    segment_digests,
    write_head,
    write_segment,
)
from jcrosslora.shelf.records import ShelfBase, ShelfEntry
from jcrosslora.utils import version
from jcrosslora.utils.unfinished import locked

SEGMENT = 256  # adapters; the last segment is written again with each change


class ChangedMeanwhileError(UsageError):
    """Another process has changed the shelf since it was opened."""


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
    def create(cls, folder: Path, base: ShelfBase, encoder: str) -> Index:
        """Write an empty index, or open the one that another process has just written.

        Raises:
            OutputError: the folder holds something else, or cannot be written to.
        """
        try:
            # A creation that was stopped leaves the folder of segments, or a part of the head.
            others = folder.exists() and any(
                path.name not in (SEGMENTS, HEAD) and not path.name.startswith(f".{HEAD}.") for path in folder.iterdir()
            )
            if others and not (folder / HEAD).exists():
                msg = f"{folder}: holds files but no {HEAD}: give a new folder for the shelf"
                raise OutputError(msg)
            (folder / SEGMENTS).mkdir(parents=True, exist_ok=True)
            with locked(folder / SEGMENTS):
                if not (folder / HEAD).exists():
                    write_head(folder, Head(FORMAT, version(), base, encoder))
        except OSError as error:
            raise not_written(folder, error) from error
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> Index:
        """Read the head and all entries, without vectors.

        Raises:
            UsageError: there is no shelf, it is damaged, or of another version.
        """
        if not (folder / HEAD).is_file():
            msg = f"{folder}: is no shelf, it has no {HEAD}: make one with `jcrosslora shelf add {folder} --base BASE "
            raise UsageError(msg + "ADAPTER ...`")
        while True:
            head = read_head(folder)
            try:
                return cls(folder, head, [read_entries(folder, n, head.digests) for n in head.segments])
            except UsageError:
                # Another process may have replaced the segments since the head was read.
                if read_head(folder) == head:
                    raise

    def blocks(self) -> Iterator[tuple[Sequence[ShelfEntry], np.ndarray]]:
        """Yield the entries of each segment with the vectors (S, D) of all their samples, in order, as float32.

        Raises ChangedMeanwhileError or, for a missing or damaged file, UsageError.
        """
        for number, part in zip(self.head.segments, self.parts, strict=True):
            if part:
                yield part, self._vectors(number, part)

    def change(self, fresh: Sequence[tuple[ShelfEntry, np.ndarray]], removed: Collection[str] = ()) -> Index:
        """Put entries on the shelf, and take others off; changes that other processes made are kept.

        Args:
            fresh: entries with the vectors (samples, D) of their samples; they replace those of equal names.
            removed: names of entries to take off.

        Raises:
            OutputError: the folder cannot be written to, or another process has put another adapter of one of these
                names on the shelf or has replaced the shelf.
            UsageError: the index is damaged.
        """
        try:
            with locked(self.folder / SEGMENTS):
                now = self if read_head(self.folder) == self.head else self._reopened(fresh)
                return now._changed(fresh, {*removed, *(entry.name for entry, _ in fresh)})
        except OSError as error:
            raise not_written(self.folder, error) from error

    def _reopened(self, fresh: Sequence[tuple[ShelfEntry, np.ndarray]]) -> Index:
        """Read what another process has made of the index."""
        now = Index.open(self.folder)
        old, new = ({entry.name: entry.place for entry in index.entries} for index in (self, now))
        clash = [one.name for one, _ in fresh if new.get(one.name, one.place) not in (one.place, old.get(one.name))]
        if clash or (now.head.base.digest, now.head.encoder) != (self.head.base.digest, self.head.encoder):
            what = f"put another adapter {clash[0]!r} on the shelf" if clash else "put another shelf there"
            msg = f"{self.folder}: another process has {what} meanwhile: look at `jcrosslora shelf list`, and try again"
            raise OutputError(msg)
        return now

    def _changed(self, fresh: Sequence[tuple[ShelfEntry, np.ndarray]], left_out: Collection[str]) -> Index:
        kept, items = [], []
        for number, part in zip(self.head.segments, self.parts, strict=True):
            open_ended = number == self.head.segments[-1] and len(part) < SEGMENT
            if not open_ended and all(entry.name not in left_out for entry in part):
                kept.append((number, part))
                continue
            split = split_samples(self._vectors(number, part), part)
            items += [(one, vectors) for one, vectors in zip(part, split, strict=True) if one.name not in left_out]
        items += fresh
        new = max(self.head.segments, default=0)
        digests: dict[str, str] = {}
        for number, _ in kept:
            digests |= segment_digests(self.folder, number, self.head.digests)
        for start in range(0, max(len(items), 1), SEGMENT):
            # If all entries are removed, an empty segment keeps its number from being used again.
            new += 1
            chunk = items[start : start + SEGMENT]
            digests |= write_segment(self.folder, new, chunk)
            kept.append((new, tuple(entry for entry, _ in chunk)))
        numbers, parts = zip(*kept, strict=True)
        made = Index(self.folder, replace(self.head, segments=numbers, digests=digests, version=version()), parts)
        write_head(made.folder, made.head)
        remove_others(self.folder, numbers)
        return made

    def _vectors(self, number: int, part: Sequence[ShelfEntry]) -> np.ndarray:
        try:
            found = read_vectors(self.folder, number, part, {} if number in self._checked else self.head.digests)
        except UsageError as error:
            if read_head(self.folder) == self.head:
                raise
            msg = f"{self.folder}: another process has changed the shelf since it was opened: open it again"
            raise ChangedMeanwhileError(msg) from error
        self._checked.add(number)
        return found


def split_samples(vectors: np.ndarray, entries: Sequence[ShelfEntry]) -> list[np.ndarray]:
    """Split the vectors of a block by entry."""
    return np.split(vectors, np.cumsum([len(entry.samples) for entry in entries])[:-1]) if entries else []
