"""Records of what the cache holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.cache.manifest import MANIFEST, Damaged, read_manifest


@dataclass(frozen=True)
class Entry:
    """An entry on disk.

    Attributes:
        kind: the kind of its content, such as "transport".
        key: its name, a digest.
        path: its folder.
        what: one line that describes the content; the reason in brackets if the manifest cannot be read.
        size: bytes of its files' contents.
        used: time of its last use, in seconds since 1970.
    """

    kind: str
    key: str
    path: Path
    what: str
    size: int
    used: float


@dataclass(frozen=True, eq=False)
class Loaded:
    """The content of an entry.

    Attributes:
        facts: see `Manifest`.
        arrays: by name, on the host.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def read_entry(path: Path, kind: str, key: str) -> Entry | None:
    """Return the entry in a folder, without reading its arrays; None if there is none."""
    try:
        used = path.stat().st_mtime
        try:
            manifest = read_manifest(path, kind, key)
            what, size, used = manifest.what, manifest.size, (path / MANIFEST).stat().st_mtime
        except Damaged as error:
            what = f"[{error}]"
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return None
    return Entry(kind, key, path, what, size, used)
