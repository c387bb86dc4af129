"""What the index of a shelf says of its base and of each adapter: plain data, read and written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jcrosslora.text import Message

# Text, or the messages in front of an answer; `text.Prompt` spelt out, as it is read from JSON.
Sample = str | tuple[Message, ...]


@dataclass(frozen=True)
class ShelfBase:
    """The base of a shelf.

    Attributes:
        name: of the base.
        place: a hub id, or a path, from the shelf's folder if it is not absolute.
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
    """What a moved adapter was moved from, as its own record states it.

    Attributes:
        adapter: name of the source adapter.
        base: name of the source base.
        base_digest: of its weights.
        method: of the transfer.
    """

    adapter: str | None = None
    base: str | None = None
    base_digest: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class ShelfEntry:
    """An adapter on a shelf.

    Attributes:
        name: unique on the shelf.
        place: a hub id, or a path, from the shelf's folder if it is not absolute.
        digest: of its weights file.
        verified: whether its own record names the base by digest. Otherwise only the shapes were compared.
        kind: such as "LoRA".
        rank: the largest of its modules.
        modules: how many it updates.
        size: of its weights file in bytes.
        origin: what it was moved from; None where it has no record of a transfer.
        verdict: the level of the transfer's verdict, or None.
        effect: of the transfer, as in its report, or None.
        lift: the share of a trained adapter's gain that it recovers, as the user stated it, or None.
        licence: as its card states it, or None.
        config_digest: of the configuration beside its weights, which decides their scale; "" where it is not known.
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
        kept: names of those that were on the shelf as they are.
        refused: those that are damaged or of another base.
    """

    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = field(default=())
