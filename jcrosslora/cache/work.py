"""Provide temporary folders for writers, and remove those of killed processes.

A writer holds an advisory lock on its folder, which the system releases however the process ends.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jcrosslora.utils.locks import try_lock

# A younger folder may not be locked yet; creating and locking it takes microseconds.
_SETTLED_SECONDS = 60.0
# Without locks, a folder that did not change for a day has no writer.
_ABANDONED_SECONDS = 86400.0


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """Create a folder in `parent` and remove it with its content when the block ends.

    Raises:
        OSError: it cannot be created.
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


def remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` whose processes have ended."""
    with suppress(OSError):
        for folder in parent.iterdir():
            with suppress(OSError):
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    age = time.time() - folder.stat().st_mtime
    if age < _SETTLED_SECONDS:
        return
    try:
        lock = try_lock(folder)
    except BlockingIOError:
        return
    if lock is not None or age > _ABANDONED_SECONDS:
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder and return the descriptor; None without locks, where age alone decides."""
    try:
        return try_lock(folder)
    except BlockingIOError:
        return None
