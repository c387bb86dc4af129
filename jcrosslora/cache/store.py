"""The store: entries by kind and key in a folder that several processes may share, bounded in bytes.

An entry is made in a folder of its own and renamed into place, so it is there whole or not at all; every byte is
compared with its manifest when it is read. One that is damaged counts as missing and is removed. Nothing here raises
because of what is on the disk: without a cache the work is the same, only slower.
"""

import importlib.metadata
import logging
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jcrosslora.cache.arrays import read_arrays, write_arrays
from jcrosslora.cache.digests import FileDigests
from jcrosslora.cache.manifest import MANIFEST, Damaged, Manifest, check_files, measure_files, read_manifest
from jcrosslora.cache.place import cache_limit, cache_root
from jcrosslora.cache.work import sweep, work_folder

KINDS = ("factors", "transport", "vocabulary", "depth")
_WORK = ".work"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """An entry as it lies on the disk.

    Attributes:
        kind: one of `KINDS`.
        key: its name.
        path: its folder.
        what: one line for people; the reason in brackets if the manifest cannot be read.
        size: bytes on disk, those of its files' contents.
        used: time of its last use, seconds since 1970.
    """

    kind: str
    key: str
    path: Path
    what: str
    size: int
    used: float


@dataclass(frozen=True, eq=False)
class Loaded:
    """What an entry holds.

    Attributes:
        facts: see `Manifest`.
        arrays: by name, on the host.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


class Cache:
    """Factors and transports on disk. Safe to share between processes, and to kill.

    Attributes:
        root: the folder; entries lie in `arrays/KIND/KEY` below it.
        limit: bytes that they may take; when a new one exceeds it, those not used for longest go.
        digests: of the bases' files.
    """

    def __init__(self, root: str | Path, *, limit: int | None = None):
        """Use a folder; nothing is made before something is kept.

        Args:
            root: the folder.
            limit: in bytes; None is `cache_limit()`.

        Raises:
            UsageError: $JCROSSLORA_CACHE_SIZE makes no sense.
        """
        self.root = Path(root).expanduser()
        self.limit = cache_limit() if limit is None else limit
        self.digests = FileDigests(self.root / "digests")
        self._folder = self.root / "arrays"
        self._writable = True
        self._writer: ThreadPoolExecutor | None = None
        self._writing: deque[Future[None]] = deque()

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Inside, `save` returns before the entry is written; at the end all are written.

        At most two wait or are being written, which bounds memory; on an error those that wait are given up.
        """
        if self._writer is not None:
            yield
            return
        with ThreadPoolExecutor(1, thread_name_prefix="cache") as self._writer:
            try:
                yield
                self._await_writing(left=0)
            finally:
                self._writer.shutdown(cancel_futures=True)
                self._writer = None
                self._writing.clear()

    def facts(self, kind: str, key: str) -> Mapping[str, Any] | None:
        """The facts of an entry without reading its arrays, marked as used now as well; None if there is none."""
        folder = self._folder / kind / key
        try:
            facts = read_manifest(folder, kind, key).facts
        except OSError:
            return None
        except Damaged as error:
            self._drop(kind, key, error)
            return None
        _mark_used(folder)
        return facts

    def load(self, kind: str, key: str) -> Loaded | None:
        """An entry, checked byte by byte, and marked as used now; None if there is none, or it was damaged."""
        folder = self._folder / kind / key
        try:
            manifest = read_manifest(folder, kind, key)
            # Checked first: what Orbax does with damaged files is anyone's guess.
            check_files(folder, manifest)
            arrays = read_arrays(folder, manifest.arrays)
        except FileNotFoundError:
            return None
        except (Damaged, OSError, ValueError, KeyError, TypeError) as error:
            # Another process may have removed it meanwhile, which is no damage; nor is a folder of another user's.
            if os.path.isdir(folder):
                self._drop(kind, key, error)
            return None
        _mark_used(folder)
        return Loaded(manifest.facts, arrays)

    def save(
        self, kind: str, key: str, what: str, arrays: Mapping[str, jax.Array | np.ndarray], facts: Mapping[str, Any]
    ) -> None:
        """Keep an entry. If there is one already it stays; if it cannot be written, a warning is logged, once.

        Of several processes that work together by `jax.distributed` the first alone writes.

        Args:
            kind: one of `KINDS`.
            key: a digest of all that the content follows from.
            what: one line for people.
            arrays: by name; names are made of letters, digits and _.
            facts: JSON values that belong to them.
        """
        if self._writer is None:
            self._save(kind, key, what, arrays, facts)
            return
        self._await_writing(left=1)
        self._writing.append(self._writer.submit(self._save, kind, key, what, arrays, facts))

    def _await_writing(self, left: int) -> None:
        while len(self._writing) > left:
            self._writing.popleft().result()

    def _save(
        self, kind: str, key: str, what: str, arrays: Mapping[str, jax.Array | np.ndarray], facts: Mapping[str, Any]
    ) -> None:
        place = self._folder / kind / key
        size = sum(array.nbytes for array in arrays.values())
        if jax.process_index() or not self._writable or size > self.limit or os.path.exists(place):
            return
        try:
            sweep(self._folder / _WORK)
            with work_folder(self._folder / _WORK) as work:
                self._write(work / "entry", place, Manifest(kind, key, what, facts, {}, {}, _version()), arrays)
            self._evict()
        except (OSError, ValueError) as error:
            self._writable = False
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            _LOG.warning("the cache %s cannot be written (%s); going on without it", self.root, reason)

    def keys(self, kind: str, prefix: str = "") -> list[str]:
        """Keys of the entries of a kind that begin with `prefix`, sorted."""
        with suppress(OSError):
            return sorted(name for name in os.listdir(self._folder / kind) if name.startswith(prefix))
        return []

    def entries(self, kinds: Collection[str] = KINDS) -> list[Entry]:
        """All entries of some kinds, the longest unused first."""
        found = [entry for kind in kinds for key in self.keys(kind) if (entry := self._entry(kind, key)) is not None]
        return sorted(found, key=lambda entry: (entry.used, entry.key))

    def verify(self, entry: Entry) -> str | None:
        """What is wrong with an entry, compared byte by byte; None if nothing is, or it is gone."""
        try:
            check_files(entry.path, read_manifest(entry.path, entry.kind, entry.key))
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            return str(error) if entry.path.exists() else None
        return None

    def remove(self, entry: Entry) -> bool:
        """Remove an entry at one stroke; False if it was gone already.

        Raises:
            OSError: it cannot be removed.
        """
        with work_folder(self._folder / _WORK) as work:
            try:
                entry.path.rename(work / "entry")
            except FileNotFoundError:
                return False
        return True

    def _write(self, work: Path, place: Path, manifest: Manifest, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
        work.mkdir()
        shapes = write_arrays(work, arrays)
        record = {"arrays": shapes, "files": measure_files(work)}
        Manifest(**(vars(manifest) | record)).write(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was first, with the same content
                raise

    def _evict(self) -> None:
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        for entry in entries:
            if total <= self.limit:
                return
            with suppress(OSError):
                self.remove(entry)
                total -= entry.size

    def _entry(self, kind: str, key: str) -> Entry | None:
        path = self._folder / kind / key
        try:
            used = path.stat().st_mtime
            try:
                manifest = read_manifest(path, kind, key)
                what, size, used = manifest.what, manifest.size, (path / MANIFEST).stat().st_mtime
            except Damaged as error:
                what = f"[{error}]"
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        except OSError:
            return None
        return Entry(kind, key, path, what, size, used)

    def _drop(self, kind: str, key: str, reason: Exception) -> None:
        text = " ".join(str(reason).split())[:200]
        _LOG.warning("a %s entry of the cache is damaged and will be made anew: %s", kind, text)
        entry = self._entry(kind, key)
        if entry is not None:
            with suppress(OSError):
                self.remove(entry)


def open_cache() -> Cache | None:
    """The user's cache, see `cache_root` and `cache_limit`; None for a user without home or with a limit of 0.

    Raises:
        UsageError: $JCROSSLORA_CACHE_SIZE makes no sense.
    """
    root, limit = cache_root(), cache_limit()
    return None if root is None or limit == 0 else Cache(root, limit=limit)


def _mark_used(folder: Path) -> None:
    with suppress(OSError):  # in a folder of another user, say
        os.utime(folder / MANIFEST)


def _version() -> str:
    return importlib.metadata.version("jcrosslora")
