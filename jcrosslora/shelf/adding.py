"""Find adapters in a folder, read the facts that the index needs, and put them on a shelf."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jcrosslora.adapter import Adapter, find_adapter, fit_to_base, load_adapter
from jcrosslora.adapter.folder import AdapterPaths, is_adapter, stated_licences
from jcrosslora.adapter.origin import read_header, read_record, text_of
from jcrosslora.adapter.records import why_idle
from jcrosslora.checkpoint import BaseInfo, BaseModel, is_hub_id
from jcrosslora.errors import AdapterError, JCrossLoRAError, ShortMemoryError, UsageError
from jcrosslora.shelf.index import Fresh
from jcrosslora.shelf.records import (
    WRITTEN,
    Added,
    Refused,
    Sample,
    ShelfEntry,
    is_there,
    stored_place,
    written_samples,
)
from jcrosslora.utils.files import read_small
from jcrosslora.utils.progress import track

_WRITE_AFTER = 5.0  # seconds of additions that a stop may lose


class Found(NamedTuple):
    """An adapter to add: its name on the shelf, and its path or hub id."""

    name: str
    ref: str


def find_adapters(ref: str | Path) -> list[Found]:
    """Find an adapter, or all below a folder except hidden folders, in order; raise AdapterError if there is none."""
    path = Path(ref).expanduser()
    if is_adapter(path):
        return [Found(path.resolve().stem if path.is_file() else path.resolve().name, str(path))]
    if not path.exists():
        if isinstance(ref, str) and is_hub_id(ref):
            return [Found(ref, ref)]
        find_adapter(ref)  # says what is wrong
    found = [Found(one.relative_to(path).as_posix().removesuffix(".gguf"), str(one)) for one in _below(path)]
    if not found:
        msg = f"{ref}: there is no adapter here or below: give adapters, or the folder that a batch wrote to"
        raise AdapterError(msg)
    return found


def _below(folder: Path) -> Iterator[Path]:
    seen: set[str] = set()  # links may lead back to a folder
    for current, names, files in os.walk(folder, followlinks=True):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if (resolved := os.path.realpath(current)) in seen:
            names.clear()
            continue
        seen.add(resolved)
        if current != str(folder) and is_adapter(Path(current)):
            names.clear()
            yield Path(current)
        else:
            yield from (path for name in sorted(files) if is_adapter(path := Path(current) / name))


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads the entries of adapters."""

    folder: Path  # of the shelf
    base: BaseModel
    info: BaseInfo  # with the base's digest
    samples: tuple[tuple[Sample, ...], str] | None  # the user's, with their origin; None takes those in the folders
    lift: float | None  # as the user states it

    def entry(self, found: Found, known: Mapping[str, ShelfEntry]) -> ShelfEntry:
        """Read an adapter; a known one keeps the samples and the lift that the user once gave.

        Raises:
            AdapterError: it is damaged, of another base, or its name or path cannot be displayed.
            UsageError: its name is that of another adapter on the shelf, or its samples cannot be read.
        """
        place = stored_place(self.folder, found.ref)
        for what, text, advice in (
            ("name", found.name, "give another with --name"),
            ("path", place, "rename the folder"),
        ):
            if not text or not text.isprintable():  # JSON or a terminal cannot show it
                raise AdapterError(f"the {what} {text!a} is empty, or has characters that cannot be shown: {advice}")
        old = known.get(found.name)
        if old is not None and old.place != place and is_there(self.folder, old.place):
            raise UsageError(f"the name {found.name!r} is that of {old.place} on the shelf: give another with --name")
        entry, folder = read_entry(found, self.base, self.info, place)
        samples, source = self.samples if self.samples is not None else written_samples(folder)
        given = old is not None and old.samples and old.samples_from != WRITTEN  # by the user, at an earlier time
        if old is not None and (not samples or (given and self.samples is None)):
            samples, source = old.samples, old.samples_from
        lift = self.lift if self.lift is not None or old is None else old.lift
        return replace(entry, samples=samples, samples_from=source, lift=lift)


def add_found(
    found: Sequence[Found],
    reader: Reader,
    known: Mapping[str, ShelfEntry],
    encode: Callable[[Sequence[Sample]], np.ndarray],
    write: Callable[[Fresh], None],
) -> Added:
    """Read adapters, and write their entries every few seconds and when the work ends or is stopped.

    `known` has the entries on the shelf by name. `encode` makes vectors (m, D) of m samples, at least one, and `write`
    puts entries with these vectors on the shelf.
    """
    known = dict(known)
    added, kept, refused = list[str](), list[str](), list[Refused]()
    fresh: list[tuple[ShelfEntry, np.ndarray]] = []

    def put() -> None:
        if fresh:
            written = list(fresh)
            fresh.clear()
            write(written)

    last = time.monotonic()
    try:
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
    finally:
        put()  # also what was read before a stop
    return Added(tuple(added), tuple(kept), tuple(refused))


def read_entry(found: Found, base: BaseModel, info: BaseInfo, place: str) -> tuple[ShelfEntry, Path | None]:
    """Read and check an adapter; return its entry, without samples, and its folder, None for a single .gguf file.

    Raises AdapterError if it is damaged or does nothing, its record names another base, or it does not fit the base.
    """
    files = find_adapter(found.ref)
    record = read_record(files, read_header(files))
    stated = text_of(record, "target", "digest")
    if stated is not None and stated != info.digest:
        name = record["target"].get("name")
        msg = f"is of another base by its own record: {name} ({stated[:19]}...), and the shelf is of {info.name} "
        raise AdapterError(msg + f"({info.digest[:19]}...)")
    adapter = load_adapter(found.ref, base)  # which refuses numbers that are not finite
    if (idle := why_idle(adapter)) is not None:
        raise AdapterError(idle)
    fit_to_base(adapter, info)
    entry = ShelfEntry(
        name=found.name,
        place=place,
        digest=str(adapter.info.digest),
        config_digest=config_digest(files),
        verified=stated is not None,
        kind=adapter.info.kind,
        rank=largest_rank(adapter),
        modules=len(adapter.modules),
        size=files.weights.stat().st_size,
        earlier=adapter.info.earlier,
        verdict=text_of(record, "verdict", "level"),
        effect=record.get("effect") if isinstance(record.get("effect"), dict) else None,
        licence=stated_licences(files).get("licence"),
    )
    return entry, files.folder


def largest_rank(adapter: Adapter) -> int:
    """Return the largest rank of an adapter's modules; 0 if it has none."""
    return max((factors.rank for factors in adapter.modules.values()), default=0)


def config_digest(files: AdapterPaths) -> str:
    """Return "sha256:" and hex of the configuration next to the weights; "" without one."""
    if files.config is None:
        return ""
    try:
        return f"sha256:{hashlib.sha256(read_small(files.config)).hexdigest()}"
    except OSError as error:
        msg = f"{files.config}: cannot be read ({error.strerror}): give the folder of a complete adapter"
        raise AdapterError(msg) from error
