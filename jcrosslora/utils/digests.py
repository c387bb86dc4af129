"""Digests of files, values and numerical settings, for cache keys.

The SHA-256 of a large file is remembered while its size, times and inode stay the same. Writing to a file sets a new
change time, which programs cannot reset, so changed files are noticed. The exceptions are bytes that a failing disk
flips beneath the file system, and writes that keep size and modification time on file systems without change times.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from jcrosslora.utils import version
from jcrosslora.utils.files import write_whole

# Two writes within one tick of the file system's clock have the same time.
_TICK_NS = 2 * 10**9
# Version of the computations whose results are cached; raise it with every change of the resulting numbers.
_PROCEDURE = 5


# Takes paths and a function that computes the files' hex digests; returns these in order, recorded or computed.
Digests: TypeAlias = Callable[[Sequence[Path], Callable[[], list[str]]], list[str]]


class FileDigests:
    """`Digests` kept on disk: a small file per path, in a folder that the first record creates."""

    def __init__(self, folder: Path, clock: Callable[[], int] = time.time_ns):
        self._folder, self._clock = folder, clock  # nanoseconds since 1970

    def __call__(self, paths: Sequence[Path], compute: Callable[[], list[str]]) -> list[str]:
        """Return the recorded digests if all are valid, else `compute()`, which is recorded."""
        if (found := self.known(paths)) is not None:
            return found
        before = [file_state(path) for path in paths]
        computed = compute()
        for path, state, digest in zip(paths, before, computed, strict=True):
            if state is not None and state == file_state(path) and is_settled(state, self._clock()):
                self._keep(path, state, digest)
        return computed

    def known(self, paths: Sequence[Path]) -> list[str] | None:
        """Return the recorded hex digests of files in their order; None if one has no valid record."""
        found = [digest for path in paths if (digest := self._find(path, file_state(path))) is not None]
        return found if len(found) == len(paths) else None

    def _record(self, path: Path) -> Path:
        return self._folder / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()}.json"

    def _find(self, path: Path, state: list[int] | None) -> str | None:
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(self._record(path).read_bytes())
            if state is not None and record["state"] == state and record["check"] == _check(state, record["sha256"]):
                return record["sha256"]
        return None

    def _keep(self, path: Path, state: list[int], digest: str) -> None:
        content = {"state": state, "sha256": digest, "check": _check(state, digest)}
        with suppress(OSError):  # A digest without a record is computed again.
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._record(path), json.dumps(content).encode())


def file_state(path: Path) -> list[int] | None:
    """Return device, inode, size and times of a file; every write changes some of them. None without a file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def is_settled(state: list[int], now: int) -> bool:
    """Return whether a file was last written long enough before `now`, in ns, for a new write to have new times."""
    return now - max(state[3:]) > _TICK_NS


def _check(state: list[int], digest: object) -> str:
    return hashlib.sha256(json.dumps([state, digest]).encode()).hexdigest()


def digest_of(*parts: Any) -> str:
    """Return the SHA-256 (hex) of JSON values; other values, such as numpy's numbers, count by their text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def sha256(*parts: bytes) -> str:
    """Return the SHA-256 (hex) of byte strings, each preceded by its length, so that no two lists collide."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()


def numerics_key() -> str:
    """Return the key of everything that decides the last digits: devices, settings of JAX, versions, and procedure.

    JAX does not distinguish makes of processors, so a result that another processor cached may differ by rounding.
    """
    import jax

    devices = jax.local_devices()
    # LAPACK comes from scipy, and on a CPU from numpy as well.
    versions = [version(name) for name in ("jcrosslora", "jax", "jaxlib", "numpy", "scipy")]
    settings = [jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision]  # type: ignore[attr-defined]
    kind = [jax.default_backend(), devices[0].device_kind, len(devices)]
    if jax.default_backend() != "cpu":
        # Decides how many matrices a device works on at once; a CPU takes them one by one.
        kind.append(jax.process_count())
    return digest_of(_PROCEDURE, versions, kind, settings)
