"""Read the adapters that are to be put on a shelf, one after the other."""

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
from jcrosslora.shelf.places import is_there, stored_place
from jcrosslora.shelf.reading import Found, read_entry
from jcrosslora.shelf.records import Added, Refused, Sample, ShelfEntry
from jcrosslora.shelf.sampling import own_samples
from jcrosslora.utils.progress import track

_WRITE_AFTER = 5.0  # seconds of additions that a stop may lose
Fresh = list[tuple[ShelfEntry, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads what a shelf is to say of adapters.

    Attributes:
        folder: of the shelf.
        base: of the shelf.
        info: the same base with its digest.
        samples: those that the user gives for all adapters, with their origin; None takes what lies beside each.
        lift: that the user states, or None.
    """

    folder: Path
    base: BaseModel
    info: BaseInfo
    samples: tuple[tuple[Sample, ...], str] | None
    lift: float | None

    def entry(self, found: Found, known: Mapping[str, ShelfEntry]) -> ShelfEntry:
        """Read an adapter; what the user has stated once of one that is known stays.

        Raises:
            AdapterError: it is damaged, of another base, or its name or place cannot be written down.
            UsageError: its name is that of another adapter on the shelf, or its samples cannot be read.
        """
        place = stored_place(self.folder, found.ref)
        _check_text(found.name, place)
        old = known.get(found.name)
        if old is not None and old.place != place and is_there(self.folder, old.place):
            msg = f"the name {found.name!r} is that of {old.place} on the shelf: give another with --name"
            raise UsageError(msg)
        entry, folder = read_entry(found, self.base, self.info, place)
        samples, source = self.samples if self.samples is not None else own_samples(folder)
        if old is not None and not samples:
            samples, source = old.samples, old.samples_from  # that were given once
        lift = self.lift if self.lift is not None or old is None else old.lift
        return dataclasses.replace(entry, samples=samples, samples_from=source, lift=lift)


def add_found(
    found: Sequence[Found],
    reader: Reader,
    known: Mapping[str, ShelfEntry],
    encode: Callable[[Sequence[Sample]], np.ndarray],
    write: Callable[[Fresh], None],
) -> Added:
    """Read adapters and write them down every few seconds, and when the work ends or is stopped.

    Args:
        found: the adapters.
        reader: reads each.
        known: the entries on the shelf by name.
        encode: makes vectors (m, D) of m samples.
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
                        fresh.append((entry, encode(entry.samples)))
                        added.append(one.name)
                        known[one.name] = entry
                bar.update()
                if time.monotonic() - last > _WRITE_AFTER:
                    put()
                    last = time.monotonic()
    return Added(tuple(added), tuple(kept), tuple(refused))


def _check_text(name: str, place: str) -> None:
    """Refuse what JSON or a terminal cannot show."""
    for what, text in (("name", name), ("path", place)):
        if not text or not text.isprintable():
            msg = f"the {what} {text!a} is empty, or has characters that cannot be shown: "
            raise AdapterError(msg + ("give another with --name" if what == "name" else "rename the folder"))
