"""`jcrosslora cache`: list, verify and clear what is kept, the texts that bases wrote included."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jcrosslora.cache import Cache, Entry
from jcrosslora.cache.place import cache_root
from jcrosslora.errors import CacheError

Kind = Literal["all", "factors", "transport", "vocabulary", "depth", "texts"]
_TEXTS = "texts"


@dataclass(frozen=True)
class List:
    """Show every entry: its kind, what it is, its size, when it was used last; and the total."""

    def run(self, console: Console) -> None:
        """Print the table."""
        cache = _cache()
        entries = _entries(cache, "all")
        table = Table()
        for name in ("kind", "what", "size", "last used"):
            table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
        for entry in reversed(entries):
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            table.add_row(entry.kind, Text(entry.what), _megabytes(entry.size), used)
        if entries:
            console.print(table)
        total, limit = _megabytes(sum(entry.size for entry in entries)), _megabytes(cache.limit)
        _say(console, f"{cache.root}: {len(entries)} entries, {total}; without texts at most {limit}")


@dataclass(frozen=True)
class Verify:
    """Compare every byte with what was written; exits with 2 if an entry is damaged and stays."""

    remove: bool = False
    """Remove what is damaged; it is made anew when it is needed."""

    def run(self, console: Console) -> None:
        """Print what is damaged."""
        cache = _cache()
        entries = _entries(cache, "all")
        damaged = 0
        for entry in entries:
            if (reason := _verify(cache, entry)) is not None:
                damaged += 1
                _say(console, f"{entry.path}: {reason}")
                if self.remove:
                    _remove(cache, entry)
        if damaged and not self.remove:
            msg = f"{cache.root}: {damaged} of {len(entries)} entries are damaged; remove them with --remove"
            raise CacheError(msg)
        removed = f", {damaged} damaged ones were removed" if damaged else ""
        _say(console, f"{cache.root}: {len(entries) - damaged} entries are whole{removed}")


@dataclass(frozen=True)
class Clear:
    """Remove all entries, or those of one kind."""

    kind: Kind = "all"
    """What to remove."""

    def run(self, console: Console) -> None:
        """Remove, and say how much."""
        cache = _cache()
        entries = _entries(cache, self.kind)
        for entry in entries:
            _remove(cache, entry)
        total = _megabytes(sum(entry.size for entry in entries))
        _say(console, f"{cache.root}: {len(entries)} entries removed, {total}")


Action = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Clear, tyro.conf.subcommand("clear")]
)


@dataclass(frozen=True)
class CacheCommand:
    """List, verify or clear the factors, transports and texts that are kept in the user's cache folder."""

    action: Annotated[Action, tyro.conf.arg(name="")]
    """What to do."""

    def run(self, console: Console) -> None:
        """Do it."""
        self.action.run(console)


def _cache() -> Cache:
    root = cache_root()
    if root is None:
        msg = "there is no cache: the user has no home folder; name a folder in JCROSSLORA_CACHE"
        raise CacheError(msg)
    return Cache(root)


def _entries(cache: Cache, kind: Kind) -> list[Entry]:
    kept = [] if kind == _TEXTS else cache.entries(None if kind == "all" else kind)
    texts = [_text_entry(path) for path in _text_files(cache)] if kind in ("all", _TEXTS) else []
    return sorted([*kept, *texts], key=lambda entry: entry.used)


def _text_files(cache: Cache) -> list[Path]:
    from jcrosslora.evidence.probes.cache import TEXTS

    return [path for path in (cache.root / TEXTS).glob("*.json") if path.is_file()]


def _text_entry(path: Path) -> Entry:
    stat = path.stat()
    return Entry(_TEXTS, path.stem, path, "texts that a base wrote", stat.st_size, stat.st_mtime)


def _verify(cache: Cache, entry: Entry) -> str | None:
    if entry.kind != _TEXTS:
        return cache.verify(entry)
    from jcrosslora.evidence.probes.cache import find_texts

    return "it is not what was written" if find_texts(entry.key) is None else None


def _remove(cache: Cache, entry: Entry) -> None:
    try:
        if entry.kind == _TEXTS:
            entry.path.unlink(missing_ok=True)
        else:
            cache.remove(entry)
    except OSError as error:
        msg = f"{entry.path}: cannot be removed ({error.strerror}): make the folder writable, or remove it yourself"
        raise CacheError(msg) from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
