"""Folders that one process works in, and the removal of those whose process was killed.

A writer holds an advisory lock on its folder, which the system lets go of when the process ends, however it ends.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on Windows: there only age tells
    fcntl = None

# Between the making of a folder and the lock on it lie microseconds.
_SETTLED_SECONDS = 60.0
# Where locks cannot be had, a folder that nothing was put into for a day has no writer.
_ABANDONED_SECONDS = 86400.0


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """Give a new folder in `parent`, which is made if need be; the folder and all in it goes when the block ends.

    Raises:
        OSError: the system refuses to make it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=parent))
    lock = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path) -> None:
    """Remove the folders in `parent` whose processes have ended; those of live ones stay."""
    with suppress(OSError):
        for folder in parent.iterdir():
            with suppress(OSError):
                _remove_if_left(folder)


def _remove_if_left(folder: Path) -> None:
    age = time.time() - folder.stat().st_mtime
    if age < _SETTLED_SECONDS:
        return
    try:
        lock = _lock(folder, wanted=True)
    except BlockingIOError:
        return
    if lock is not None or age > _ABANDONED_SECONDS:
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _lock(folder: Path, *, wanted: bool = False) -> int | None:
    """A descriptor that holds the lock; None where there are no locks. Held by another: an error if `wanted`."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if wanted and isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
