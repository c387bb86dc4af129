"""Exit codes from verdicts, for scripts: `--fail-on no-effect`."""

from collections.abc import Iterable
from typing import Literal

FailOn = Literal["never", "no-effect"]
NO_EFFECT = 3
# Levels of `jcrosslora.report.verdict` that expect no effect, or harm. A control is to have none.
_LEVELS = frozenset({"chance", "lost", "ineffective", "destructive", "unknown"})


def exit_code(fail_on: FailOn, levels: Iterable[str]) -> int:
    """Give 3 if `fail_on` is "no-effect" and one of the verdicts' levels expects no effect; else 0."""
    return NO_EFFECT if fail_on == "no-effect" and not _LEVELS.isdisjoint(levels) else 0
