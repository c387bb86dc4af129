"""Arrays that are derived from the index and kept next to it, with a digest: changed ones count as missing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jcrosslora.cache.keys import digest_of
from jcrosslora.shelf.index_files import Head
from jcrosslora.utils.files import write_whole
from jcrosslora.utils.reading import regular_size

_KEY, _SEAL = "index", "sha256"


def index_key(head: Head) -> str:
    """Return what changes with every change of the index: numbers of segments are not used twice."""
    return digest_of(head.base.digest, head.encoder, head.segments)


def find_arrays(path: Path, key: str | None) -> dict[str, np.ndarray] | None:
    """Read arrays; None where there are none, none of this key, or damaged ones. Any key will do if it is None."""
    try:
        regular_size(path)
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if key is not None and metadata.get(_KEY) != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    # What an earlier version wrote has no digest.
    return arrays if metadata.get(_SEAL) in (None, _digest(arrays)) else None


def keep_arrays(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays; a shelf that cannot be written to is searched without them."""
    # Of an array in another order safetensors writes the bytes as they lie in memory.
    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with suppress(OSError):
        write_whole(path, save(ordered, metadata={_KEY: key, _SEAL: _digest(ordered)}))


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        found.update(f"{name!r} {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()
