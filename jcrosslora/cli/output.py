"""What commands print: lines that nothing reformats, JSON, and the exit codes that `--fail-on` asks for."""

import json
import sys
from collections.abc import Iterable
from typing import Any, Literal

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colour, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print data as JSON on stdout, with nothing else beside it."""
    json.dump(data, sys.stdout, indent=2, allow_nan=False)
    print()


FailOn = Literal["never", "no-effect"]
FailOnLoss = Literal["never", "loss"]
ASKED_FOR = 3  # the exit code of a failure that `--fail-on` asks for
# Levels of `jcrosslora.report.verdict` that expect no effect, or harm. A control is to have none.
_LEVELS = frozenset({"chance", "lost", "ineffective", "destructive", "unknown"})


def exit_code(fail_on: FailOn, levels: Iterable[str]) -> int:
    """Give 3 if `fail_on` is "no-effect" and one of the verdicts' levels expects no effect; else 0."""
    return ASKED_FOR if fail_on == "no-effect" and not _LEVELS.isdisjoint(levels) else 0
