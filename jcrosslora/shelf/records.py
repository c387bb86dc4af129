"""The records of a shelf's index: its base and adapters, paths, and samples of a task.

A `place` is a hub id, or a path seen from the shelf's folder, so that a shelf can move together with its adapters.
Samples are prompts of an adapter's task: from the completions of its transfer, or from the user's file.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jcrosslora.adapter.folder import is_adapter
from jcrosslora.adapter.records import Earlier
from jcrosslora.checkpoint import is_hub_id
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.text import COMPLETIONS, Message, Prompt, prompt_text
from jcrosslora.utils.picking import from_start

WRITTEN = "completions"  # where samples are from that the source wrote when the adapter was moved
SAMPLES = 32  # the most that the shelf keeps of an adapter
_LONGEST = 2000  # characters of a sample
# Text, or the messages before an answer; `text.Prompt` spelt out, as it is read from JSON.
Sample = str | tuple[Message, ...]


@dataclass(frozen=True)
class ShelfBase:
    """The base of a shelf; `digest` is that of its weights, "sha256:" and hex."""

    name: str
    place: str
    digest: str
    family: str
    revision: str | None = None


@dataclass(frozen=True)
class ShelfEntry:
    """An adapter on a shelf.

    Attributes:
        verified: whether the record of its transfer names the base by digest; otherwise only shapes were compared.
        rank: the largest of its modules.
        size: of its weights file in bytes.
        earlier: the adapters that it was moved from, the original first; none without a record of a transfer.
        verdict: the level of the transfer's verdict.
        effect: of the transfer, as in its report.
        lift: the share of a trained adapter's gain that it recovers, as the user stated it.
        config_digest: of the configuration next to its weights, which decides their scale; "" without one.
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
    earlier: tuple[Earlier, ...] = ()
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
    """

    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()


def stored_place(folder: Path, place: str) -> str:
    """Return a path or a hub id in the form that the index stores."""
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
    """Return the name of an encoder in the form that the index stores; its model may be in a folder."""
    kind, colon, model = name.partition(":")
    return f"{kind}:{stored_place(folder, model)}" if colon else name


def opened_encoder(folder: Path, name: str) -> str:
    """Return the name of an encoder to open; undoes `stored_encoder`."""
    kind, colon, model = name.partition(":")
    path = folder.resolve() / model
    return f"{kind}:{os.path.normpath(path)}" if colon and path.exists() else name


def given_samples(path: str | Path) -> tuple[tuple[Prompt, ...], str]:
    """Read at most 32 different prompts, evenly spread over a user's file, and return them with the file's name.

    Prompts over 2,000 characters are skipped unless all are.
    """
    different = list(dict.fromkeys(read_prompts(path)))
    short = [one for one in different if len(prompt_text(one)) <= _LONGEST]
    return from_start(short or different, SAMPLES), Path(path).name


def written_samples(folder: Path | None) -> tuple[tuple[Prompt, ...], str]:
    """Read samples from the completions in an adapter's folder; their source is `WRITTEN`, or "nothing"."""
    if folder is None or not (folder / COMPLETIONS).is_file():
        return (), "nothing"
    return given_samples(folder / COMPLETIONS)[0], WRITTEN


def labelled_prompts(
    labelled: Sequence[str], unrelated: str | Path | None, limit: int
) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    """Read at most `limit` prompts of each file, and the names of each one's adapters, none for unrelated ones.

    Labels are "NAME=FILE" or "NAME,NAME=FILE"; UsageError is raised for another form, or a file that cannot be read.
    """
    if limit < 1:
        raise UsageError(f"{limit} samples were asked for; expected 1 or more")
    files: list[tuple[tuple[str, ...], str | Path]] = []
    for label in labelled:
        names, _, file = label.partition("=")
        if not names or not file:
            msg = f"{label!r} is no label: write NAME=FILE, or NAME,NAME=FILE for several adapters of one task"
            raise UsageError(msg)
        files.append((tuple(names.split(",")), file))
    files += [] if unrelated is None else [((), unrelated)]
    read = [(from_start(read_prompts(file), limit), names) for names, file in files]
    prompts = [prompt for each, _ in read for prompt in each]
    return prompts, [names for each, names in read for _ in each]
