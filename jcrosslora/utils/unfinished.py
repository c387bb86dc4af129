"""Temporary folders and files next to outputs, and locks that show whether their process is still alive."""

import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# Within a temporary folder: what becomes the output, and what was there before, moved aside for a moment.
NEW, OLD = "new", "old"
# Name of the output, host, random part. Without a host it is of an earlier version.
_NAME = re.compile(r"\.(.+)\.(?:([0-9a-f]{8})-)?[a-z0-9_]{8,16}\.tmp")
# Another host's lock may not be seen on a shared file system, and some file systems have none: there, what has not
# changed for a day has no writer.
_ABANDONED_SECONDS = 86400.0
_UNCHANGED_SECONDS = 30 * 86400.0  # after which kept answers and states of fits are removed


def remove_unchanged(parent: Path, kept: Path) -> None:
    """Remove folders that did not change for 30 days from a folder, but for one; errors are passed over."""
    with suppress(OSError):
        for other in parent.iterdir():
            with suppress(OSError):
                if other != kept and time.time() - other.stat().st_mtime > _UNCHANGED_SECONDS:
                    shutil.rmtree(other)


@contextmanager
def unfinished(out: Path, *, file: bool = False) -> Iterator[Path]:
    """Make an empty temporary folder or file next to an output; it is removed at the end if it still exists.

    What killed processes left of the same output is removed first.
    """
    remove_unfinished(out.parent, {out.name})
    work, lock = _make(out, file)
    try:
        yield work
    finally:
        _remove(work)
        if lock is not None:
            os.close(lock)


def remove_unfinished(parent: Path, names: Collection[str]) -> None:
    """Remove what killed processes left of outputs of these names in a folder.

    An output that a killed process had moved aside, to replace it, is put back. What a live process writes to stays,
    and so does what cannot be removed.
    """
    with suppress(OSError):
        for name in os.listdir(parent):
            found = _NAME.fullmatch(name)
            if found and found[1] in names:
                with suppress(OSError):
                    _remove_left(parent / name, parent / found[1], here=found[2] == _host())


def _make(out: Path, file: bool) -> tuple[Path, int | None]:
    while True:
        work = out.with_name(f".{out.name}.{_host()}-{secrets.token_hex(4)}.tmp")
        if file:
            work.touch(exist_ok=False)
        else:
            work.mkdir(mode=0o700)
        # `remove_unfinished` may come between the two.
        with suppress(FileNotFoundError):
            lock = try_lock(work, wait=True)
            if os.path.lexists(work):
                return work, lock
            if lock is not None:
                os.close(lock)


def _remove_left(work: Path, out: Path, *, here: bool) -> None:
    with locked(work, wait=False) as lock:
        if (here and lock is not None) or time.time() - _last_change(work) > _ABANDONED_SECONDS:
            if (work / NEW).exists() and (work / OLD).exists() and not os.path.lexists(out):
                (work / OLD).rename(out)
            _remove(work)


def _last_change(work: Path) -> float:
    return max(path.lstat().st_mtime for path in (work, *work.rglob("*")))


def _remove(work: Path) -> None:
    if work.is_symlink() or not work.is_dir():
        with suppress(OSError):
            work.unlink(missing_ok=True)
        return
    try:
        # Threads of a writer that failed, such as Orbax's, may still put a file into it.
        for pause in (0.0, 0.1, 0.5):
            time.sleep(pause)
            shutil.rmtree(work, ignore_errors=True)
            if not work.exists():
                return
    except BaseException:  # an interrupt
        shutil.rmtree(work, ignore_errors=True)
        raise


@cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def try_lock(path: Path, *, wait: bool = False) -> int | None:
    """Lock a folder or a file and return the descriptor, which is to be closed; None if there are no locks.

    `wait` waits while another process holds the lock. Raises BlockingIOError if another process holds it and `wait` is
    False, and OSError if it cannot be opened.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # of a pipe nothing is waited for
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    return descriptor


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Keep other processes that lock a folder or a file out of a block; yields the descriptor, see `try_lock`."""
    descriptor = try_lock(path, wait=wait)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)
