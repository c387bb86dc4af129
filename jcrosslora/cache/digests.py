"""SHA-256 of large files, remembered while a file's size, times and inode stay as they were.

A file that is written to gets a new change time, which no program can set back, so the digest of other content is not
taken for its own. What is not noticed: bytes that a failing disk turns beneath the file system, and writes on file
systems that keep no change times if size and modification time stay.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from jcrosslora.utils.files import write_whole

# Two writes within one tick of the file system's clock leave one time.
_TICK_NS = 2 * 10**9


class FileDigests:
    """Digests of files in a folder of small records, one for each path."""

    def __init__(self, folder: Path):
        """Use a folder, which is made when something is remembered."""
        self._folder = folder

    def sha256s(self, paths: Sequence[Path], compute: Callable[[], list[str]]) -> list[str]:
        """The digests of files.

        Args:
            paths: the files.
            compute: reads them and gives their hex digests, in their order; called if not all are remembered.

        Returns:
            The hex digests, in the order of `paths`.
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
        with suppress(OSError):  # A digest that cannot be kept is computed again.
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
