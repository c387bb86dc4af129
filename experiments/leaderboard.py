"""Make `docs/leaderboard.md` from the lines in `experiments/results/`.

    python experiments/leaderboard.py [--check]

With `--check` it writes nothing, and exits with 1 if the page differs from the lines.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from result_lines import FOLDER, Figure, ResultLine, read_lines

import jcrosslora as jcl

PAGE = Path(__file__).parent.parent / "docs" / "leaderboard.md"
_HEAD = """# Leaderboard

Moved adapters, sorted by task and by lift. `experiments/results/` has one line for each row, with all figures and their
95% intervals over examples; `experiments/leaderboard.py` makes this page from them. To add your own bases, see
[Contributing](https://github.com/jcrosslora/jcrosslora/blob/main/CONTRIBUTING.md#add-a-result).

- *Lift* is the share of a trained adapter's gain that the moved one keeps, in negative log-likelihood per character of
  the right answers: 0 is the target alone, 1 an adapter trained on the target.
- *Score* says how written answers are judged: as equal JSON, by exact match or, where a task has several references, by
  chrF. The last four columns hold this score: of the target alone (*base*), of the target with the moved adapter
  (*moved*) and with the trained one (*trained*), and of the source with the adapter before the move (*source*).

Click on the head of a column to sort by it.
"""
# The names that GGUF files state for themselves, and the names that people use.
MODELS = {
    "Smollm2 135M 8k Lc100K Mix1 Ep2": "SmolLM2-135M-Instruct",
    "Gemma 3 270m": "Gemma 3 270M",
    "Qwen2.5 Coder 0.5B Instruct AWQ": "Qwen2.5-Coder-0.5B-Instruct",
    "Qwen2.5 Coder 1.5B Instruct GGUF": "Qwen2.5-Coder-1.5B-Instruct",
}
_COLUMNS = ("task", "from", "to", "method", "prompts", "seed", "lift", "score", "base", "moved", "trained", "source")
_SCORES = ("json", "exact", "chrf")


def page(lines: Sequence[ResultLine]) -> str:
    """Return the page as Markdown."""
    if any(line.split != "test" for line in lines):
        raise jcl.UsageError(f"the page is of test examples alone; take lines of other splits out of {FOLDER}")
    ranked = sorted(lines, key=lambda line: (line.task, -_lift(line), line.seed))
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_row, ranked)]
    return _HEAD + "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _lift(line: ResultLine) -> float:
    lift = line.figures["nll_per_char"].lift
    return 0.0 if lift is None else lift.value


def _row(line: ResultLine) -> tuple[str, ...]:
    # Skip exact match where even the trained adapter never writes a reference word for word.
    name = next(name for name in _SCORES if name in line.figures and line.figures[name].lift is not None)
    score, lift = line.figures[name], line.figures["nll_per_char"].lift
    share = "" if lift is None else f"{lift.value:.2f} [{lift.low:.2f}, {lift.high:.2f}]"
    models = (MODELS.get(model, model) for model in (line.source, line.target))
    return (line.task, *models, f"`{line.method}`", str(line.prompts), str(line.seed), share, name, *_figures(score))


def _figures(score: Figure) -> list[str]:
    return ["" if one is None else f"{one.value:.3g}" for one in (score.base, score.moved, score.trained, score.source)]


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
        sys.exit("leaderboard: docs/leaderboard.md differs from experiments/results: run the script without --check")


if __name__ == "__main__":
    main()
