"""Remember the SHA-256 of large files while a file's size, times and inode stay the same.

Writing to a file sets a new change time, which programs cannot reset, so changed files are noticed. The exceptions are
bytes that a failing disk flips beneath the file system, and writes that keep size and modification time on file systems
without change times.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from jcrosslora.utils.files import write_whole

# Two writes within one tick of the file system's clock have the same time.
_TICK_NS = 2 * 10**9


class FileDigests:
    """Digests of files, remembered in a folder with one small record for each path."""

    def __init__(self, folder: Path):
        """Use a folder, which is created with the first record."""
        self._folder = folder

    def sha256s(self, paths: Sequence[Path], compute: Callable[[], list[str]]) -> list[str]:
        """Return the hex digests of files, in their order.

        Args:
            paths: the files.
            compute: reads the files and returns their hex digests in this order; called unless all are remembered.
        """
        before = [_state(path) for path in paths]
        known = [self._find(path, state) for path, state in zip(paths, before, strict=True)]
        found = [digest for digest in known if digest is not None]
        if len(found) == len(paths):
            return found
        computed = compute()
        for path, state, digest in zip(paths, before, computed, strict=True):
            if state is not None and state == _state(path) and _settled(state):
                self._keep(path, state, digest)
        return computed

    def _record(self, path: Path) -> Path:
        return self._folder / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"

    def _find(self, path: Path, state: list[int] | None) -> str | None:
        if state is None:
            return None
        try:
            record = json.loads(self._record(path).read_bytes())
            if record["state"] == state and record["check"] == _check(state, record["sha256"]):
                return record["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    def _keep(self, path: Path, state: list[int], digest: str) -> None:
        content = {"path": str(path.absolute()), "state": state, "sha256": digest, "check": _check(state, digest)}
        with suppress(OSError):  # A digest without a record is computed again.
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._record(path), json.dumps(content).encode())


def _state(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _settled(state: list[int]) -> bool:
    return time.time_ns() - max(state[3:]) > _TICK_NS


def _check(state: list[int], digest: object) -> str:
    return hashlib.sha256(json.dumps([state, digest]).encode()).hexdigest()
