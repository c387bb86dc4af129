"""`jcrosslora cache`: list, verify and clear the cache on disk, including the texts that bases wrote."""

import time
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Column
from rich.text import Text

from jcrosslora.cli.output import print_json, print_table, say
from jcrosslora.errors import CacheError
from jcrosslora.utils.cache import Cache, cache_root
from jcrosslora.utils.cache_entries import Entry

Kind = Literal["all", "factors", "transport", "vocabulary", "depth", "texts"]
_TEXTS = "texts"


@dataclass(frozen=True)
class List:
    """Show every entry with its kind, content, size and last use, and the total."""

    json: bool = False
    """Print the entries as JSON."""

    def run(self, console: Console) -> None:
        cache, entries = _opened()
        if self.json:
            shown = [
                {"kind": one.kind, "content": one.what, "path": str(one.path), "bytes": one.size, "used": one.used}
                for one in entries
            ]
            print_json({"folder": str(cache.root), "limit": cache.limit, "entries": shown})
            return
        rows = (
            (one.kind, Text(one.what), _megabytes(one), time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used)))
            for one in reversed(entries)
        )
        columns = [Column(name, overflow="fold") for name in ("kind", "content", "size", "last used")]
        columns[2].justify = "right"
        if entries:
            print_table(console, columns, rows)
        limit = f"{cache.limit / 1e6:,.1f} MB"
        say(console, f"{cache.root}: {len(entries)} entries, {_megabytes(*entries)}; without texts at most {limit}")


@dataclass(frozen=True)
class Verify:
    """Compare every byte with its digest; exit with 2 if an entry is damaged and was not removed."""

    remove: bool = False
    """Remove damaged entries; they are made again when needed."""

    def run(self, console: Console) -> None:
        cache, entries = _opened()
        damaged = 0
        for entry in entries:
            if (reason := _verify(cache, entry)) is not None:
                damaged += 1
                say(console, f"{entry.path}: {reason}")
                if self.remove:
                    _remove(cache, entry)
        if damaged and not self.remove:
            msg = f"{cache.root}: {damaged} of {len(entries)} entries are damaged; remove them with --remove"
            raise CacheError(msg)
        removed = f", {damaged} damaged ones were removed" if damaged else ""
        say(console, f"{cache.root}: {len(entries) - damaged} entries are whole{removed}")


@dataclass(frozen=True)
class Clear:
    """Remove all entries, or those of one kind."""

    kind: Kind = "all"
    """The kind of entries to remove."""

    def run(self, console: Console) -> None:
        cache, entries = _opened(self.kind)
        for entry in entries:
            _remove(cache, entry)
        say(console, f"{cache.root}: {len(entries)} entries removed, {_megabytes(*entries)}")


ACTIONS = {"list": List, "verify": Verify, "clear": Clear}


def _opened(kind: Kind = "all") -> tuple[Cache, list[Entry]]:
    """Return the cache, and its entries of a kind, those first that were not used for the longest time."""
    from jcrosslora.evaluate.probes import TEXTS

    root = cache_root()
    if root is None:
        msg = "no cache folder: the user has no home folder; name one in the environment variable JCROSSLORA_CACHE"
        raise CacheError(msg)
    cache = Cache(root)
    found = [] if kind == _TEXTS else [*cache.entries(None if kind == "all" else kind)]
    for path in (root / TEXTS).glob("*.json") if kind in ("all", _TEXTS) else ():
        if path.is_file():
            stat = path.stat()
            found += [Entry(_TEXTS, path.stem, path, "texts that a base wrote", stat.st_size, stat.st_mtime)]
    return cache, sorted(found, key=lambda entry: entry.used)


def _verify(cache: Cache, entry: Entry) -> str | None:
    if entry.kind != _TEXTS:
        return cache.verify(entry)
    from jcrosslora.evaluate.probes import find_texts

    return "its content differs from what was written" if find_texts(entry.key) is None else None


def _remove(cache: Cache, entry: Entry) -> None:
    try:
        if entry.kind == _TEXTS:
            entry.path.unlink(missing_ok=True)
        else:
            cache.remove(entry)
    except OSError as error:
        msg = f"{entry.path}: cannot be removed ({error.strerror}): make the folder writable, or remove it yourself"
        raise CacheError(msg) from error


def _megabytes(*entries: Entry) -> str:
    return f"{sum(entry.size for entry in entries) / 1e6:,.1f} MB"
