"""Open the base or the shelf that a command names."""

from pathlib import Path
from typing import TYPE_CHECKING

from jcrosslora.errors import UsageError

if TYPE_CHECKING:
    from jcrosslora.checkpoint import BaseModel
    from jcrosslora.shelf import Shelf


def opened_base(base: str | None, template: Path | None) -> "BaseModel":
    """Open a base, with a chat template in place of its own where one is given.

    Raises:
        UsageError: no base was given, or the template cannot be read.
        CheckpointError: the base cannot be read.
    """
    from jcrosslora.checkpoint import open_base

    if base is None:
        msg = "no base was given: give one with --base, or a shelf, which knows its own, with --shelf"
        raise UsageError(msg)
    return open_base(base, chat_template=template)


def opened_shelf(folder: Path, base: str | None, template: Path | None) -> "Shelf":
    """Open a shelf, and its base with a chat template where one is given.

    Raises:
        UsageError: a template without the base, another base, or no shelf.
        CheckpointError: the base cannot be read.
    """
    from jcrosslora.shelf import Shelf

    if base is None and template is not None:
        msg = f"the template {template} was given and no base: give the shelf's base with --base"
        raise UsageError(msg)
    return Shelf(folder, None if base is None else opened_base(base, template))
