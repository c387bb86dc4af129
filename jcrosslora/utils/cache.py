"""Cache arrays on disk, keyed by digests of everything they were computed from, in a folder that processes may share.

An entry is written in a temporary folder and renamed into place, so it is complete or absent. Every byte is checked
against the manifest when it is read; a damaged entry counts as missing and is removed. Disk errors never stop a
command: the cache only saves time, and may be removed at any moment.
"""

import hashlib
import logging
import os
import platform
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jcrosslora.errors import UsageError
from jcrosslora.utils import cache_entries, version
from jcrosslora.utils.cache_entries import Damaged, Entry, Loaded, Manifest, file_of
from jcrosslora.utils.digests import FileDigests
from jcrosslora.utils.files import parse_size
from jcrosslora.utils.settings import checked
from jcrosslora.utils.unfinished import unfinished

_WORK = ".work"
_LOG = logging.getLogger(__name__)
_DEFAULT_LIMIT = 10 * 10**9
_WORTH_A_LINK = 2**16  # bytes
_MAX_BYTES = 512 * 2**20  # beyond which the least recently used programs are removed
# What JAX warns of, for each program, on a full disk or while another process holds the lock of the folder; the program
# is then compiled and not kept.
_UNKEPT = r"Error (writing persistent compilation cache entry|reading .*: Timeout)"


class _Written(NamedTuple):
    """An array in memory that a file of an entry holds, and the bytes and SHA-256 of that file."""

    array: weakref.ref[np.ndarray]
    path: Path
    measured: tuple[int, str]


class Cache:
    """Arrays on disk. Processes may share it, and be killed at any time.

    Attributes:
        root: the folder; entries are in `arrays/KIND/KEY` below it.
        limit: largest size of all entries in bytes; a new entry beyond it evicts the least recently used ones.
        digests: remembered digests of the bases' files.
    """

    @checked
    def __init__(self, root: str | Path, *, limit: int | None = None):
        """Use a folder, which is created with the first entry; the default limit is `cache_limit`."""
        self.root = Path(root).expanduser()
        self.limit = cache_limit() if limit is None else limit
        self.digests = FileDigests(self.root / "digests")
        self._folder = self.root / "arrays"
        self._writable = True
        self._sizes: dict[Path, int] = {}  # of entries by folder, which do not change
        self._writer: ThreadPoolExecutor | None = None
        self._writing: deque[Future[None]] = deque()
        self._written: dict[int, _Written] = {}  # by id of the array

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Let `save` return before the entry is written; the end of the block waits for all entries.

        At most two entries wait or are being written, which limits memory. An error drops the waiting ones.
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
        """Return the facts of an entry without reading its arrays, and mark it as used; None if there is none."""
        folder = self._folder / kind / key
        try:
            facts = cache_entries.read_manifest(folder).facts
        except OSError:
            return None
        except Damaged as error:
            self._drop(folder, error)
            return None
        _mark_used(folder)
        return facts

    def load(self, kind: str, key: str) -> Loaded | None:
        """Read and check an entry, and mark it as used; None if there is none, or it is damaged."""
        folder = self._folder / kind / key
        try:
            manifest = cache_entries.read_manifest(folder)
            cache_entries.check_files(folder, manifest)
            arrays = cache_entries.read_arrays(folder, manifest.arrays)
        except FileNotFoundError:
            return None
        except (Damaged, OSError, ValueError, KeyError, TypeError) as error:
            # Not damaged if another process removed it, or if the folder belongs to another user.
            if os.path.isdir(folder):
                self._drop(folder, error)
            return None
        _mark_used(folder)
        self._remember(folder, manifest.files, arrays)
        return Loaded(manifest.facts, arrays)

    def save(
        self, kind: str, key: str, what: str, arrays: Mapping[str, jax.Array | np.ndarray], facts: Mapping[str, Any]
    ) -> None:
        """Write an entry, unless one exists already. If it cannot be written, log one warning.

        Under `jax.distributed`, only the first process writes. `what` describes the
        content in one line; names of arrays consist of letters, digits and _; facts are JSON values. An array that
        this process has saved in another entry, or loaded from one, is linked to instead of being written again: it
        must not be changed after it was saved.
        """
        manifest = Manifest(kind, key, what, facts, arrays={}, files={}, version=version())
        if self._writer is None:
            self._save(manifest, arrays)
            return
        self._await_writing(left=1)
        self._writing.append(self._writer.submit(self._save, manifest, arrays))

    def _await_writing(self, left: int) -> None:
        while len(self._writing) > left:
            self._writing.popleft().result()

    def _save(self, manifest: Manifest, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
        place = self._folder / manifest.kind / manifest.key
        size = sum(array.nbytes for array in arrays.values())
        if jax.process_index() or not self._writable or size > self.limit or os.path.exists(place):
            return
        try:
            with self._work() as work:
                self._write(work / "entry", place, manifest, arrays)
            self._evict()
        except OSError as error:
            self._writable = False
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
            _LOG.warning("the cache %s cannot be written (%s); going on without it", self.root, reason)

    def keys(self, kind: str, prefix: str = "") -> list[str]:
        """Return the sorted keys of a kind that start with `prefix`."""
        with suppress(OSError):
            return sorted(name for name in os.listdir(self._folder / kind) if name.startswith(prefix))
        return []

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return all entries of one kind, or of all kinds, least recently used first."""
        found = map(cache_entries.read_entry, self._folders(kind))
        return sorted((entry for entry in found if entry is not None), key=lambda entry: (entry.used, entry.key))

    def verify(self, entry: Entry) -> str | None:
        """Compare an entry byte by byte with its manifest and describe the damage; None if it is intact or gone."""
        try:
            cache_entries.check_files(entry.path, cache_entries.read_manifest(entry.path))
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            return str(error) if entry.path.exists() else None
        return None

    def remove(self, entry: Entry) -> bool:
        """Remove an entry atomically; return False if it was gone already, and raise OSError if it cannot be."""
        with self._work() as work, suppress(FileNotFoundError):
            entry.path.rename(work / "entry")
            return True
        return False

    def _work(self) -> AbstractContextManager[Path]:
        """Make a temporary folder."""
        (self._folder / _WORK).mkdir(parents=True, exist_ok=True)
        return unfinished(self._folder / _WORK / "entry")

    def _write(self, work: Path, place: Path, manifest: Manifest, arrays: Mapping[str, jax.Array | np.ndarray]) -> None:
        work.mkdir()
        found = {name: self._written.get(id(array)) for name, array in arrays.items()}
        known = {name: one for name, one in found.items() if one is not None and one.array() is arrays[name]}
        shapes = cache_entries.write_arrays(work, arrays, {name: one.path for name, one in known.items()})
        measured = {file_of(name): one.measured for name, one in known.items()}
        record = {"arrays": shapes, "files": cache_entries.measure_files(work, measured)}
        Manifest(**(vars(manifest) | record)).write(work)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another process wrote the same content first
                raise
        self._remember(place, record["files"], arrays)

    def _remember(self, place: Path, files: Mapping[str, tuple[int, str]], arrays: Mapping[str, Any]) -> None:
        """Remember the files of large arrays as long as these are in memory."""
        for name, array in arrays.items():
            if isinstance(array, np.ndarray) and array.nbytes >= _WORTH_A_LINK:
                forget = partial(self._written.pop, id(array), None)
                held = weakref.ref(array, lambda _, forget=forget: forget())
                self._written[id(array)] = _Written(held, place / file_of(name), files[file_of(name)])

    def _evict(self) -> None:
        """Remove the least recently used entries beyond the limit; all are read again only above the limit."""
        total = self._total()
        for entry in self.entries() if total > self.limit else ():
            if total <= self.limit:
                return
            with suppress(OSError):
                self.remove(entry)
                total -= entry.size

    def _total(self) -> int:
        """Return the bytes of all entries; known ones are not read again."""
        sizes: dict[Path, int] = {}
        for folder in self._folders():
            if folder in self._sizes:
                sizes[folder] = self._sizes[folder]
            elif (entry := cache_entries.read_entry(folder)) is not None:
                sizes[folder] = entry.size
        self._sizes = sizes
        return sum(sizes.values())

    def _folders(self, kind: str | None = None) -> list[Path]:
        """Return the folders of the entries of one kind, or of all."""
        kinds = [] if kind is None else [kind]
        if kind is None:
            with suppress(OSError):
                kinds = sorted(name for name in os.listdir(self._folder) if name != _WORK)
        return [self._folder / one / key for one in kinds for key in self.keys(one)]

    def _drop(self, folder: Path, reason: Exception) -> None:
        text = " ".join(str(reason).split())[:200]
        _LOG.warning("a %s entry of the cache is damaged and will be computed again: %s", folder.parent.name, text)
        if (entry := cache_entries.read_entry(folder)) is not None:
            with suppress(OSError):
                self.remove(entry)


def open_cache() -> Cache | None:
    """Open the user's cache, see `cache_root` and `cache_limit`; None for a user without a home or for a limit of 0."""
    root, limit = cache_root(), cache_limit()
    return None if root is None or limit == 0 else Cache(root, limit=limit)


def cache_root() -> Path | None:
    """Return $JCROSSLORA_CACHE, else `jcrosslora` in $XDG_CACHE_HOME or ~/.cache; None for a user without a home.

    A leading ~ is expanded, because not every shell does it inside a variable.
    """
    try:
        if own := os.environ.get("JCROSSLORA_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "jcrosslora"
    except RuntimeError:
        return None


def cache_folder(kind: str) -> Path:
    """Return the cache folder of one kind of data, such as "models"; it is not created.

    Raises UsageError if the user has no home folder and no environment variable names a cache.
    """
    root = cache_root()
    if root is None:
        raise UsageError("no cache folder: the user has no home folder; set JCROSSLORA_CACHE to a folder")
    return root / kind


def cache_limit() -> int:
    """Return the bytes that cached arrays may take: $JCROSSLORA_CACHE_SIZE, such as 500MB or 20G, else 10 GB.

    Raises UsageError if the variable is not a size.
    """
    stated = os.environ.get("JCROSSLORA_CACHE_SIZE") or str(_DEFAULT_LIMIT)
    if (size := parse_size(stated)) is None:
        msg = f"JCROSSLORA_CACHE_SIZE is {stated!r}, expected a number of bytes such as 500MB or 20G; 0 turns it off"
        raise UsageError(msg)
    return size


def keep_compiled() -> None:
    """Turn on JAX's compilation cache in the user's cache folder, unless the environment names another.

    JAX recompiles a damaged program with a warning, and one that another process locks without a warning. Programs that
    cannot be written are not kept. Each kind of processor has a folder, because a program for one may not run on
    another.
    """
    root = cache_root()
    if root is None or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = root / "compiled" / processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        return
    warnings.filterwarnings("ignore", _UNKEPT)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # all are kept, so that a second run has none


def processor() -> str:
    """Return a name for the kind of processor, of 16 characters: a program compiled for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    stated = "\n".join(sorted(kinds)) or platform.processor()
    return hashlib.sha256(f"{platform.machine()}\n{stated}".encode()).hexdigest()[:16]


def _mark_used(folder: Path) -> None:
    with suppress(OSError):  # e.g. in the folder of another user
        os.utime(folder / cache_entries.MANIFEST)
