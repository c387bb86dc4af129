"""Advisory locks on folders and files, which the system releases however a process ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def try_lock(path: Path, *, wait: bool = False) -> int | None:
    """Lock a folder or a file and return the descriptor, which is to be closed; None where there are no locks.

    Args:
        path: that exists.
        wait: whether to wait while another process holds the lock.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: it cannot be opened.
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
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that lock the folder out of a block.

    Raises:
        OSError: the folder cannot be opened.
    """
    descriptor = try_lock(folder, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
