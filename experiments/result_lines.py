"""Lines of results: one JSON object for a moved adapter, with every figure and its interval.

`jobs.py` writes them, `leaderboard.py` makes a page of those in `experiments/results/`.
"""

import importlib.metadata
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

import jcrosslora as jcl
from jcrosslora.evaluate import Interval

FOLDER = Path(__file__).parent / "results"


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


class ResultLine(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What came of one move.

    Attributes:
        source: name of the base that the adapter was trained on.
        target: name of the base that it was moved to.
        task: name of the data.
        split: of the data, "test" unless something is chosen by it.
        examples: how many were answered.
        seed: of training and move.
        training_steps: of the source's adapter and of the one trained on the target.
        method: with its settings, as `METHOD` or `METHOD:KEY=VALUE,...`.
        prompts: unlabelled prompts that the method was given.
        figures: by name, such as `nll_per_char`.
        versions: of the packages that decide the numbers.
        commit: of this repository.
    """

    source: str
    target: str
    task: str
    split: str
    examples: int
    seed: int
    training_steps: int
    method: str
    prompts: int
    figures: dict[str, Figure]
    versions: dict[str, str]
    commit: str


def append(path: Path, lines: Iterable[ResultLine]) -> None:
    """Add lines to a file."""
    with path.open("ab") as file:
        for line in lines:
            file.write(msgspec.json.encode(line) + b"\n")


def read_lines(path: Path) -> list[ResultLine]:
    """Read a file of lines.

    Raises:
        UsageError: a line is not one; the message names it.
    """
    found = []
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(msgspec.json.decode(text, type=ResultLine))
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
