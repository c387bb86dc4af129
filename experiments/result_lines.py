"""Lines of results: one JSON object for a moved adapter, with every figure and its interval.

`jobs.py` writes them, `leaderboard.py` makes a page of those in `experiments/results/`, and `page_figures.py` checks
that the tables of other pages state nothing else. `gains.py` writes lines with a figure for each item, and
`gain_table.py` makes tables of them.
"""

import importlib.metadata
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

import jcrosslora as jcl
from jcrosslora.evaluate import Interval

FOLDER = Path(__file__).parent / "results"
STATED = FOLDER / "stated"  # lines of results of which no whole line was kept


class Figure(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One figure of all that were measured on the same examples, with 95% intervals over examples.

    Attributes:
        base: of the target alone.
        trained: of the target with an adapter that was trained on it.
        moved: of the target with the moved adapter.
        lift: (moved - base) / (trained - base); None where the trained adapter gains nothing beyond the interval.
        source: of the source with its own adapter, if it was measured.
    """

    base: Interval
    trained: Interval
    moved: Interval
    lift: Interval | None
    source: Interval | None = None


class MadeLine(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What every line says of how it was made.

    Attributes:
        source: name of the base that the adapter was trained on.
        target: name of the base that it was moved to.
        task: name of the data.
        split: of the data, "test" unless something is chosen by it.
        seed: of trainings and move.
        training_steps: of all adapters that are trained.
        prompts: unlabelled prompts that were used.
        versions: of the packages that decide the numbers.
        commit: of this repository when the adapter was made.
    """

    source: str
    target: str
    task: str
    split: str
    seed: int
    training_steps: int
    prompts: int
    versions: dict[str, str]
    commit: str


class ResultLine(MadeLine, kw_only=True):
    """What came of one move.

    Attributes:
        examples: how many were answered.
        method: with its settings, as `METHOD` or `METHOD:KEY=VALUE,...`.
        figures: by name, such as `nll_per_char`.
    """

    examples: int
    method: str
    figures: dict[str, Figure]


class Stated(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A figure as far as it is known: a mean, its 95% interval over examples, its deviation over seeds, each seed's."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    sd: float | None = None
    seeds: list["Stated"] = []

    def numbers(self) -> list[float]:
        """Return all numbers that it holds."""
        own = [one for one in (self.value, self.low, self.high, self.sd) if one is not None]
        return own + [number for seed in self.seeds for number in seed.numbers()]


class StatedLine(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A result of which no whole line was kept: what a page states of it. None is what is not known.

    Attributes:
        section: heading of the tables that state it.
        rows: what the rows are called, in the words of the pages.
        source: name of the base that the adapter was trained on.
        target: name of the base that it was moved to.
        task: name of the data.
        split: of the data.
        examples: how many were answered.
        seeds: of training and move.
        part: "base", "trained" on the target, or "moved".
        method: of the move, with its settings; None for the other parts.
        prompts: unlabelled prompts that the method was given; None for the other parts.
        figures: by name, such as `nll_per_char`, `lift`, or `accuracy_minus_base`.
        note: what else is to be known of it.
        versions: of the packages that decide the numbers.
        commit: of this repository.
    """

    section: str
    rows: list[str]
    source: str
    target: str
    task: str
    split: str
    examples: int
    seeds: list[int]
    part: Literal["base", "trained", "moved"]
    method: str | None
    prompts: int | None
    figures: dict[str, Stated]
    note: str | None
    versions: dict[str, str] | None
    commit: str | None


class GainLine(MadeLine, kw_only=True):
    """What one row of `gains.py` answered, item by item, so that rows and seeds can be compared in pairs.

    Attributes:
        row: "base", "source", "trained", "answers", "answers, torch", or a method with its settings.
        measure: of `right`: "exact" for written answers, "accuracy" for chosen ones.
        right: 1 or 0 for each item.
        nll_per_char: of the right answer to each item, in nats.
        seconds: that making the adapter took; None where nothing was made, or it is not known.
    """

    row: str
    measure: Literal["exact", "accuracy"]
    right: str
    nll_per_char: list[float]
    seconds: float | None

    @property
    def key(self) -> tuple[str, str, str, str, int, str, int]:
        """Return what tells it from other lines."""
        return self.source, self.target, self.task, self.split, self.seed, self.row, self.prompts


Line = TypeVar("Line", ResultLine, StatedLine, GainLine)


def append(path: Path, lines: Iterable[msgspec.Struct]) -> None:
    """Add lines to a file."""
    with path.open("ab") as file:
        for line in lines:
            file.write(msgspec.json.encode(line) + b"\n")


def read_lines(path: Path, kind: type[Line] = ResultLine) -> list[Line]:
    """Read a file of lines.

    Args:
        path: of the file.
        kind: of its lines.

    Raises:
        UsageError: a line is not one; the message names it.
    """
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(msgspec.json.decode(text, type=kind))
        except msgspec.MsgspecError as error:
            msg = f"{path}, line {number}: is not a result ({error}); copy it as experiments/jobs.py wrote it"
            raise jcl.UsageError(msg) from None
    return found


def versions() -> Mapping[str, str]:
    """Return the versions of the packages that decide the numbers."""
    return {name: importlib.metadata.version(name) for name in ("jcrosslora", "jax")}


def commit() -> str:
    """Return the commit of this checkout, with a + where files were changed since; "unknown" outside of one."""
    try:
        head = _git("rev-parse", "--short=9", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    return found.stdout.strip()
