"""Sample prompts of an adapter's task: from the completions of its transfer, or from the user's file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from jcrosslora.errors import UsageError
from jcrosslora.evaluate.examples import read_prompts
from jcrosslora.text import Prompt
from jcrosslora.text.completion import COMPLETIONS, prompt_text

SAMPLES = 32  # the most that the shelf keeps of an adapter
_LONGEST = 2000  # characters of a sample
T = TypeVar("T")


def given_samples(path: str | Path) -> tuple[tuple[Prompt, ...], str]:
    """Read at most 32 different prompts, evenly spread over a user's file, and return them with the file's name."""
    return spread_prompts(read_prompts(path)), Path(path).name


def written_samples(folder: Path) -> tuple[tuple[Prompt, ...], str]:
    """Read samples as `given_samples` does from the completions in an adapter's folder, which its transfer wrote.

    Their source is "completions", or "nothing" if there are none.
    """
    if not (folder / COMPLETIONS).is_file():
        return (), "nothing"
    return given_samples(folder / COMPLETIONS)[0], "completions"


def labelled_prompts(
    labelled: Sequence[str], unrelated: str | Path | None, limit: int
) -> tuple[list[Prompt], list[tuple[str, ...]]]:
    """Read prompts and the names of each one's adapters, none for unrelated ones.

    Args:
        labelled: "NAME=FILE" or "NAME,NAME=FILE" each.
        unrelated: a file of prompts of no adapter's task, or None.
        limit: the most prompts of a file.

    Raises:
        UsageError: a label without a name or a file, or a file that cannot be read.
    """
    files: list[tuple[tuple[str, ...], str | Path]] = []
    for label in labelled:
        names, _, file = label.partition("=")
        if not names or not file:
            msg = f"{label!r} is no label: write NAME=FILE, or NAME,NAME=FILE for several adapters of one task"
            raise UsageError(msg)
        files.append((tuple(names.split(",")), file))
    if unrelated is not None:
        files.append(((), unrelated))
    read = [(spread(read_prompts(file), limit), names) for names, file in files]
    prompts = [prompt for each, _ in read for prompt in each]
    return prompts, [names for each, names in read for _ in each]


def spread_prompts(prompts: Sequence[Prompt], count: int = SAMPLES) -> tuple[Prompt, ...]:
    """Take at most `count` different prompts, evenly spread; skip those over 2,000 characters unless all are."""
    different = list(dict.fromkeys(prompts))
    short = [one for one in different if len(prompt_text(one)) <= _LONGEST]
    return tuple(spread(short or different, count))


def spread(items: Sequence[T], count: int) -> list[T]:
    """Take at most `count` items, evenly spread over all."""
    if count < 1:
        msg = f"{count} samples were asked for; wanted 1 or more"
        raise UsageError(msg)
    return [items[number * len(items) // count] for number in range(count)] if len(items) > count else list(items)
