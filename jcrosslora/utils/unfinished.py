"""Temporary folders of outputs, locked while their process lives; those of killed processes are removed."""

import os
import re
import shutil
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from jcrosslora.utils.locks import try_lock

_NAME = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # of a temporary folder, with the name of the output


def make_unfinished(out: Path) -> tuple[Path, int | None]:
    """Make an empty temporary folder beside an output.

    Returns:
        The folder, and a descriptor whose closing releases its lock; None where there are no locks.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        # `remove_unfinished` may come between the two.
        with suppress(FileNotFoundError):
            lock = try_lock(work, wait=True)
            if work.is_dir():
                return work, lock
            if lock is not None:
                os.close(lock)


def remove_unfinished(parent: Path, names: Collection[str]) -> None:
    """Remove the temporary folders of outputs of these names in a folder, if nobody writes to them any more.

    What cannot be removed stays, and so does all where there are no locks.
    """
    with suppress(OSError):
        for name in os.listdir(parent):
            found = _NAME.fullmatch(name)
            if found and found[1] in names:
                with suppress(OSError):
                    _remove_unlocked(parent / name)


def _remove_unlocked(work: Path) -> None:
    lock = try_lock(work)
    if lock is not None:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)
