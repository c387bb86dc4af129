"""Compute the keys of entries: digests of everything that their content depends on, never of names.

The SHA-256 of a large file is remembered while its size, times and inode stay the same.

Writing to a file sets a new change time, which programs cannot reset, so changed files are noticed. The exceptions are
bytes that a failing disk flips beneath the file system, and writes that keep size and modification time on file systems
without change times.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jcrosslora.checkpoint import BaseModel
from jcrosslora.utils import version
from jcrosslora.utils.files import read_small, write_whole

# Two writes within one tick of the file system's clock have the same time.
_TICK_NS = 2 * 10**9


class FileDigests:
    """Digests of files, remembered in a folder with one small record for each path."""

    def __init__(self, folder: Path, clock: Callable[[], int] = time.time_ns):
        """Use a folder, which is created with the first record; `clock` gives nanoseconds since 1970."""
        self._folder, self._clock = folder, clock

    def sha256s(self, paths: Sequence[Path], compute: Callable[[], list[str]]) -> list[str]:
        """Return the hex digests of files, in their order.

        `compute` reads the files and returns their hex digests in this order; it is called unless all are remembered.
        """
        before = [file_state(path) for path in paths]
        known = [self._find(path, state) for path, state in zip(paths, before, strict=True)]
        found = [digest for digest in known if digest is not None]
        if len(found) == len(paths):
            return found
        computed = compute()
        for path, state, digest in zip(paths, before, computed, strict=True):
            if state is not None and state == file_state(path) and is_settled(state, self._clock()):
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


def file_state(path: Path) -> list[int] | None:
    """Return device, inode, size and times of a file, some of which every write changes; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def is_settled(state: list[int], now: int) -> bool:
    """Tell whether a file was last written so long before `now`, in nanoseconds, that another write has other times."""
    return now - max(state[3:]) > _TICK_NS


def _check(state: list[int], digest: object) -> str:
    return hashlib.sha256(json.dumps([state, digest]).encode()).hexdigest()


# Version of the computations whose results are cached; raise it with every change of the resulting numbers.
_PROCEDURE = 4
# Files of a tokenizer next to the weights (see `load_tokenizer`); a GGUF file contains its own.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Keys of a configuration that say where it came from.
_PROVENANCE = frozenset({"_name_or_path", "_commit_hash", "transformers_version"})


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


def tokenizer_parts(base: BaseModel) -> Iterator[bytes]:
    """Yield names and contents of the files of a base's tokenizer next to the weights."""
    if base.tokenizer_path is None:
        return
    for name in _TOKENIZER_FILES:
        path = base.tokenizer_path / name
        # One that is there but cannot be read is an error of whoever reads the tokenizer, who says so.
        with suppress(OSError):
            yield from (name.encode(), read_small(path))


def numerics_key() -> str:
    """Return the key of everything that decides the last digits: devices, settings of JAX, versions, and procedure.

    JAX does not distinguish makes of processors, so a result that another processor cached may differ by rounding.
    """
    devices = jax.local_devices()
    # LAPACK comes from scipy, and on a CPU from numpy as well.
    versions = [version(name) for name in ("jcrosslora", "jax", "jaxlib", "numpy", "scipy")]
    settings = [jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision]  # type: ignore[attr-defined]
    kind = [jax.default_backend(), devices[0].device_kind, len(devices)]
    if jax.default_backend() != "cpu":
        # Decides how many matrices a device works on at once; a CPU takes them one by one.
        kind.append(jax.process_count())
    return digest_of(_PROCEDURE, versions, kind, settings)


def weights_key(base: BaseModel, digests: FileDigests | None = None) -> str:
    """Return the key of a base's weights and of how its modules are read from them.

    Reads the weight files once unless the base or `digests` remembers their digest.
    """
    config = {name: value for name, value in base.config.items() if name not in _PROVENANCE}
    modules = [[name, module.shape, module.tensor, module.rows] for name, module in base.modules.items()]
    return digest_of(base.digest(digests), base.family.name, config, modules)


def tokenizer_key(base: BaseModel) -> str:
    """Return the key of the files of a base's tokenizer next to the weights."""
    return sha256(*tokenizer_parts(base))
