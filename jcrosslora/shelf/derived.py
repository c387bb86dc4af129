"""Arrays that are derived from the index and kept beside it: they are computed again when the index has changed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jcrosslora.cache.keys import digest_of
from jcrosslora.shelf.index_files import Head
from jcrosslora.utils.files import write_whole

_KEY = "index"


def index_key(head: Head) -> str:
    """Return what changes with every change of the index: numbers of segments are not used twice."""
    return digest_of(head.base.digest, head.encoder, head.segments)


def find_arrays(path: Path, key: str | None) -> dict[str, np.ndarray] | None:
    """Read arrays; None where there are none, or none of this key. Any key will do if it is None."""
    try:
        with safe_open(path, framework="numpy") as file:
            if key is not None and (file.metadata() or {}).get(_KEY) != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None


def keep_arrays(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays; a shelf that cannot be written to is searched without them."""
    # Of an array in another order safetensors writes the bytes as they lie in memory.
    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with suppress(OSError):
        write_whole(path, save(ordered, metadata={_KEY: key}))
