"""Shared code of the commands: opening bases and shelves, printing, and the exit codes of `--fail-on`."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.console import Console
from rich.table import Table

from jcrosslora.errors import OutputError, UsageError
from jcrosslora.utils.files import output_path
from jcrosslora.utils.terminal import print_table as print_table
from jcrosslora.utils.terminal import say as say
from jcrosslora.utils.texts import shortened, visible

if TYPE_CHECKING:
    from jcrosslora.checkpoint import BaseModel
    from jcrosslora.evaluate import Acceptance, Interval
    from jcrosslora.report.hub import Pushed
    from jcrosslora.shelf import Shelf
    from jcrosslora.text import Prompt

PAGE = (".html", ".htm")  # endings of a page
FailOn = Literal["never", "no-effect"]
FailOnLoss = Literal["never", "loss"]
Device = Literal["cpu", "gpu", "tpu"]
ASKED_FOR = 3  # the exit code of a failure that `--fail-on` asks for


@dataclass(frozen=True, kw_only=True)
class OnDevice:
    """The flags of a command that runs models."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"run": ("device",)}

    device: Device | None = None
    """The device to compute on; by default JAX chooses."""


@dataclass(frozen=True, kw_only=True)
class Long(OnDevice):
    """The flags of a command that runs for long and writes; --quiet has it print the path alone."""

    def written(self) -> str:
        """Return the path that was written."""
        return str(self.out)  # type: ignore[attr-defined]


def use_device(device: Device) -> None:
    """Have JAX compute on devices of a kind.

    Raises UsageError if JAX finds no device of this kind.
    """
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", device)
        os.environ["JAX_PLATFORMS"] = device  # for workers
    elif (found := jax.default_backend()) != device:
        msg = f"--device {device}: JAX finds only {found}: install JAX for it, such as jax[cuda12], and see that "
        raise UsageError(msg + "JAX_PLATFORMS does not leave it out")


def exit_code(fail_on: FailOn, levels: Iterable[str]) -> int:
    """Give 3 if `fail_on` is "no-effect" and one of the verdicts' levels expects no effect, or nothing is known."""
    from jcrosslora.report.record import USELESS

    return ASKED_FOR if fail_on == "no-effect" and not {*USELESS, "unknown"}.isdisjoint(levels) else 0


def print_json(data: Any) -> None:
    """Print data as JSON on stdout."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    print()


def warn(sentences: Iterable[str | None]) -> None:
    """Print warnings on stderr, each on its line."""
    for sentence in sentences:
        if sentence is not None:
            print(f"warning: {visible(sentence, keep='')}", file=sys.stderr)


def title_of(prompt: "Prompt", most: int) -> str:
    """Return a prompt on one line, cut to a number of characters."""
    from jcrosslora.text import prompt_text

    return shortened(" ".join(prompt_text(prompt).split()), most)


def print_pushed(pushed: "Pushed", console: Console) -> None:
    """Print the notes on an upload, and where it is."""
    for note in pushed.notes:
        say(console, f"note: {note}")
    say(console, f"uploaded: {pushed.url} (commit {pushed.commit[:12]}, {len(pushed.files)} files)")


def writable_file(path: Path, endings: tuple[str, ...]) -> Path:
    """Check that a file of the user's can be written or replaced, before any work is done for it, and expand its ~.

    Raises OutputError if its name has none of the `endings` (in lower case), and may be that of another file; or if its
    folder does not exist or cannot be written to.
    """
    path = output_path(path)
    if path.suffix.lower() not in endings:
        what = "a page" if endings == PAGE else "such a file"
        msg = f"{path}: is no name of {what}, and may be that of another file: give one that ends in {endings[0]}"
        raise OutputError(msg)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be written: expected a file in a folder that exists and can be written to")
    return path


def opened_base(base: str | None, template: Path | None) -> "BaseModel":
    """Open a base, with a chat template instead of its own if one is given."""
    from jcrosslora.checkpoint import open_base

    return open_base(given_base(base), chat_template=template)


def given_base(base: str | None) -> str:
    """Raise UsageError if no base is named."""
    if base is None:
        raise UsageError("no base was given: give one with --base, or a shelf, which knows its own, with --shelf")
    return base


def opened_shelf(folder: Path, base: str | None, template: Path | None) -> "Shelf":
    """Open a shelf, and its base with a chat template if one is given."""
    from jcrosslora.shelf import Shelf

    if base is None and template is not None:
        raise UsageError(f"the template {template} was given and no base: give the shelf's base with --base")
    return Shelf(folder, None if base is None else opened_base(base, template))


def print_drafts(found: "Acceptance", notes: Sequence[str], console: Console, *, as_json: bool) -> None:
    """Print the figures of each draft; `notes` say what of the adapters is not part of them."""
    figures = found.figures()
    counts = {"answers": len(found.predicted), "tokens": found.tokens, "drafted": found.drafted, "cost": found.cost}
    if as_json:
        print_json(counts | {"drafts": [asdict(one) for one in figures], "not_scored": list(notes)})
        return
    for note in notes:
        say(console, f"not scored: {note}")
    said = f"{counts['answers']:,} answers of {found.tokens:,} tokens in all, {found.drafted} drafted for each pass by "
    say(console, f"{said}{found.cost:.2f} of the parameters, 95% intervals")
    columns = "draft", "acceptance rate", "acceptance length", "minus alone", "estimated speed-up"
    print_table(console, columns, (map(_figure_text, vars(one).values()) for one in figures))


def print_tasks(figures: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a row for each figure of lm_eval and a column for each model: "base", then the names of the adapters."""
    models = figures[0]["models"] if figures else []
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("task", "n", "shots", "metric", "base", *(one["name"] for one in models[1:])):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right", overflow="fold")
    for one in figures:
        counts = ["" if one[name] is None else f"{one[name]:,}" for name in ("examples", "shots")]
        table.add_row(one["task"], *counts, one["metric"], *map(_value_text, one["models"]))
    console.print(table, highlight=False, markup=False)
    console.print("value ± standard error, as lm_eval gives them", highlight=False)


def _value_text(model: Mapping[str, Any]) -> str:
    return f"{model['value']:.3f}" + ("" if model["stderr"] is None else f" ± {model['stderr']:.3f}")


def _figure_text(value: "Interval | float | str") -> str:
    if isinstance(value, str | int | float):
        return value if isinstance(value, str) else f"{value:.2f}"
    return f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]"
