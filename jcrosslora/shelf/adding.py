"""Read adapters one after the other, and put them on a shelf."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base_info import BaseInfo
from jcrosslora.errors import AdapterError, JCrossLoRAError, ShortMemoryError, UsageError
from jcrosslora.shelf.reading import Found, read_entry
from jcrosslora.shelf.records import Added, Refused, Sample, ShelfEntry, is_there, stored_place
from jcrosslora.shelf.samples import written_samples
from jcrosslora.utils.progress import track

_WRITE_AFTER = 5.0  # seconds of additions that a stop may lose
Fresh = list[tuple[ShelfEntry, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads the entries of adapters.

    Attributes:
        folder: of the shelf.
        base: of the shelf.
        info: of the base, with its digest.
        samples: the user's samples for all adapters, with their origin; None takes those in each adapter's folder.
        lift: as the user states it, or None.
    """

    folder: Path
    base: BaseModel
    info: BaseInfo
    samples: tuple[tuple[Sample, ...], str] | None
    lift: float | None

    def entry(self, found: Found, known: Mapping[str, ShelfEntry]) -> ShelfEntry:
        """Read an adapter; a known one keeps the samples and the lift that the user once gave.

        Raises:
            AdapterError: it is damaged, of another base, or its name or path cannot be displayed.
            UsageError: its name is that of another adapter on the shelf, or its samples cannot be read.
        """
        place = stored_place(self.folder, found.ref)
        _check_text(found.name, place)
        old = known.get(found.name)
        if old is not None and old.place != place and is_there(self.folder, old.place):
            msg = f"the name {found.name!r} is that of {old.place} on the shelf: give another with --name"
            raise UsageError(msg)
        entry, folder = read_entry(found, self.base, self.info, place)
        samples, source = self.samples if self.samples is not None else written_samples(folder)
        if old is not None and not samples:
            samples, source = old.samples, old.samples_from
        lift = self.lift if self.lift is not None or old is None else old.lift
        return dataclasses.replace(entry, samples=samples, samples_from=source, lift=lift)


def add_found(
    found: Sequence[Found],
    reader: Reader,
    known: Mapping[str, ShelfEntry],
    encode: Callable[[Sequence[Sample]], np.ndarray],
    write: Callable[[Fresh], None],
) -> Added:
    """Read adapters, and write their entries every few seconds and when the work ends or is stopped.

    Args:
        found: the adapters.
        reader: reads their entries.
        known: the entries on the shelf by name.
        encode: makes vectors (m, D) of m samples, at least one.
        write: puts entries with the vectors of their samples on the shelf.
    """
    known = dict(known)
    added: list[str] = []
    kept: list[str] = []
    refused: list[Refused] = []
    fresh: Fresh = []

    def put() -> None:
        if fresh:
            written = list(fresh)
            fresh.clear()
            write(written)

    with ExitStack() as stack:
        stack.callback(put)  # what was read before a stop is written on the way out
        last = time.monotonic()
        with track(len(found), "add adapters", "adapters") as bar:
            for one in found:
                try:
                    entry = reader.entry(one, known)
                except ShortMemoryError:
                    raise
                except JCrossLoRAError as error:
                    refused.append(Refused(one.ref, str(error).removeprefix(f"{one.ref}: ")))
                else:
                    if known.get(one.name) == entry:
                        kept.append(one.name)
                    else:
                        vectors = encode(entry.samples) if entry.samples else np.zeros((0, 0), np.float32)
                        fresh.append((entry, vectors))
                        added.append(one.name)
                        known[one.name] = entry
                bar.update()
                if time.monotonic() - last > _WRITE_AFTER:
                    put()
                    last = time.monotonic()
    return Added(tuple(added), tuple(kept), tuple(refused))


def _check_text(name: str, place: str) -> None:
    """Raise AdapterError for a name or path that JSON or a terminal cannot show."""
    for what, text in (("name", name), ("path", place)):
        if not text or not text.isprintable():
            msg = f"the {what} {text!a} is empty, or has characters that cannot be shown: "
            raise AdapterError(msg + ("give another with --name" if what == "name" else "rename the folder"))
