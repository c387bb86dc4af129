"""Where adapters and bases are, as the index writes it: hub ids, or paths as they are seen from the shelf's folder."""

import os
from pathlib import Path

from jcrosslora.adapter.folder import is_adapter
from jcrosslora.checkpoint.hub import is_hub_id


def stored_place(folder: Path, place: str) -> str:
    """Return what the index writes; a shelf may move together with its adapters."""
    path = Path(place).expanduser()
    if not path.exists():
        return place  # a hub id
    found = os.path.relpath(path.resolve(), folder.resolve())
    # Inside the shelf's folder a path may look like a hub id.
    return os.path.join(os.curdir, found) if is_hub_id(found) else found


def opened_place(folder: Path, place: str) -> str:
    """Return what can be opened of what the index writes."""
    path = folder.resolve() / place
    return os.path.normpath(path) if path.exists() or not is_hub_id(place) else place


def is_there(folder: Path, place: str) -> bool:
    """Whether the files of an adapter are where the index says; of a hub id that is not asked."""
    found = opened_place(folder, place)
    return is_adapter(Path(found)) or (found == place and is_hub_id(place))


def stored_encoder(folder: Path, name: str) -> str:
    """Return what the index writes of an encoder, whose model may be in a folder."""
    kind, colon, model = name.partition(":")
    return f"{kind}:{stored_place(folder, model)}" if colon else name


def opened_encoder(folder: Path, name: str) -> str:
    """Return the name by which an encoder that the index names can be opened."""
    kind, colon, model = name.partition(":")
    path = folder.resolve() / model
    return f"{kind}:{os.path.normpath(path)}" if colon and path.exists() else name
