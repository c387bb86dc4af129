"""Where adapters and bases are, as the index writes it: hub ids, or paths as they are seen from the shelf's folder."""

import os
from pathlib import Path

from jcrosslora.checkpoint.hub import is_hub_id


def stored_place(folder: Path, place: str) -> str:
    """Return what the index writes; a shelf may move together with its adapters."""
    path = Path(place).expanduser()
    if not path.exists():
        return place  # a hub id
    return os.path.relpath(path.resolve(), folder.resolve())


def opened_place(folder: Path, place: str) -> str:
    """Return what can be opened of what the index writes."""
    path = folder.resolve() / place
    return os.path.normpath(path) if path.exists() or not is_hub_id(place) else place
