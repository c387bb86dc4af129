"""What the index of a shelf says of its base and of each adapter, and how it writes paths.

A `place` is a hub id, or a path seen from the shelf's folder, so that a shelf can move together with its adapters.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jcrosslora.adapter.folder import is_adapter
from jcrosslora.checkpoint.hub import is_hub_id
from jcrosslora.text import Message

# Text, or the messages in front of an answer; `text.Prompt` spelt out, as it is read from JSON.
Sample = str | tuple[Message, ...]


@dataclass(frozen=True)
class ShelfBase:
    """The base of a shelf.

    Attributes:
        digest: of its weights, "sha256:" and hex.
        family: its architecture.
        revision: hub commit, or None.
    """

    name: str
    place: str
    digest: str
    family: str
    revision: str | None = None


@dataclass(frozen=True)
class Origin:
    """What an adapter was moved from, as the record of its transfer states it: names, the base's digest, the method."""

    adapter: str | None = None
    base: str | None = None
    base_digest: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class ShelfEntry:
    """An adapter on a shelf.

    Attributes:
        name: unique on the shelf.
        digest: of its weights file.
        verified: whether the record of its transfer names the base by digest; otherwise only shapes were compared.
        kind: for example "LoRA".
        rank: the largest of its modules.
        modules: how many it updates.
        size: of its weights file in bytes.
        origin: what it was moved from; None without a record of a transfer.
        verdict: the level of the transfer's verdict, or None.
        effect: of the transfer, as in its report, or None.
        lift: the share of a trained adapter's gain that it recovers, as the user stated it, or None.
        licence: as its card states it, or None.
        config_digest: of the configuration next to its weights, which decides their scale; "" if unknown.
        samples: prompts of its task.
        samples_from: "completions" that were written when it was moved, the name of the user's file, or "nothing".
    """

    name: str
    place: str
    digest: str
    verified: bool
    kind: str
    rank: int
    modules: int
    size: int
    origin: Origin | None = None
    verdict: str | None = None
    effect: dict[str, Any] | None = None
    lift: float | None = None
    licence: str | None = None
    config_digest: str = ""
    samples: tuple[Sample, ...] = ()
    samples_from: str = "nothing"


@dataclass(frozen=True)
class Refused:
    """An adapter that was not put on the shelf, with the reason."""

    place: str
    reason: str


@dataclass(frozen=True)
class Added:
    """The result of an addition.

    Attributes:
        added: names of the adapters that are new, or whose files or samples changed.
        kept: names of the adapters that were on the shelf already, unchanged.
        refused: adapters that are damaged or of another base.
    """

    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()


def stored_place(folder: Path, place: str) -> str:
    """Return what the index writes of a path or a hub id."""
    path = Path(place).expanduser()
    if not path.exists():
        return place  # a hub id
    found = os.path.relpath(path.resolve(), folder.resolve())
    # Inside the shelf's folder a path may look like a hub id.
    return os.path.join(os.curdir, found) if is_hub_id(found) else found


def opened_place(folder: Path, place: str) -> str:
    """Return the path or hub id to open; undoes `stored_place`."""
    path = folder.resolve() / place
    return os.path.normpath(path) if path.exists() or not is_hub_id(place) else place


def is_there(folder: Path, place: str) -> bool:
    """Whether the files of an adapter are where the index says; True for any hub id."""
    found = opened_place(folder, place)
    return is_adapter(Path(found)) or (found == place and is_hub_id(place))


def stored_encoder(folder: Path, name: str) -> str:
    """Return what the index writes of an encoder, whose model may be in a folder."""
    kind, colon, model = name.partition(":")
    return f"{kind}:{stored_place(folder, model)}" if colon else name


def opened_encoder(folder: Path, name: str) -> str:
    """Return the name of an encoder to open; undoes `stored_encoder`."""
    kind, colon, model = name.partition(":")
    path = folder.resolve() / model
    return f"{kind}:{os.path.normpath(path)}" if colon and path.exists() else name
