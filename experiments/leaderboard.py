"""Make the page of results, `docs/leaderboard.md`, of the lines in `experiments/results/`.

    python experiments/leaderboard.py [--check]

With `--check` nothing is written, and the exit code is 1 if the page is not that of the lines.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from result_lines import FOLDER, Figure, ResultLine, read_lines

import jcrosslora as jcl

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"
_HEAD = """# Leaderboard

Moved adapters, the best share of the trained adapter's gain first. Every row is a line of a file in
`experiments/results/`, which has all figures and their 95% intervals over examples; this page is made of these lines by
`experiments/leaderboard.py`. To add a row of your own bases see
[Contributing](https://github.com/jcrosslora/jcrosslora/blob/main/CONTRIBUTING.md#add-a-result).

"Lift" is the share of what an adapter trained on the target gains there, in negative log-likelihood per character of
right answers. The job is what is written: equal JSON, the exact answer or, where there are several references, chrF. A
click on the head of a column sorts by it.
"""
_COLUMNS = ("task", "from", "to", "method", "prompts", "seed", "lift", "the job", "base", "moved", "trained", "source")
_JOBS = ("json", "exact", "chrf")


def page(lines: Sequence[ResultLine]) -> str:
    """Return the page as Markdown."""
    if any(line.split != "test" for line in lines):
        msg = f"the page is of test examples alone; take lines of other splits out of {FOLDER}"
        raise jcl.UsageError(msg)
    ranked = sorted(lines, key=lambda line: (line.task, -_lift(line), line.seed))
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_row, ranked)]
    return _HEAD + "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _lift(line: ResultLine) -> float:
    lift = line.figures["nll_per_char"].lift
    return 0.0 if lift is None else lift.value


def _row(line: ResultLine) -> tuple[str, ...]:
    # Exact words say nothing of a task with several good answers, where a trained adapter brings none of them.
    name = next(name for name in _JOBS if name in line.figures and line.figures[name].lift is not None)
    job, lift = line.figures[name], line.figures["nll_per_char"].lift
    share = "" if lift is None else f"{lift.value:.2f} [{lift.low:.2f}, {lift.high:.2f}]"
    where = (line.task, line.source, line.target, f"`{line.method}`", str(line.prompts), str(line.seed))
    return (*where, share, name, *_figures(job))


def _figures(job: Figure) -> list[str]:
    return ["" if one is None else f"{one.value:.3g}" for one in (job.base, job.moved, job.trained, job.source)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    try:
        made = page([line for path in sorted(FOLDER.glob("*.jsonl")) for line in read_lines(path)])
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"leaderboard: {error}")
    if not check:
        PAGE.write_text(made, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        sys.exit("leaderboard: docs/leaderboard.md is not that of experiments/results: run the script without --check")


if __name__ == "__main__":
    main()
