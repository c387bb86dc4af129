"""Show which verdict the fits of `experiments/results/fits/` get, and how many right answers fits of each verdict have.

    python experiments/verdicts.py

The verdict is that of `jcrosslora.report.fit`. A row is a fit: its agreement with the source on 200 examples, the
divergence if it is known, the verdict by these 200 answers and, in how many of a hundred draws, the verdict by 20 of
them, which is what a move holds out. The last column is the share of the source's right answers: the right answers of
the fit divided by those of the source. The limits were chosen on the tasks of `CHOSEN_ON`, the others test them. Rows
of no fit, and those of adapters that were trained, which imitate no source or are no fit, are left out.
"""

import math
from collections import defaultdict
from typing import Any

import numpy as np
from agreement import labelled, read_rows
from rich.console import Console
from rich.table import Table
from scripts import wide_console

from jcrosslora.distill.facts import FitFacts
from jcrosslora.report.fit import fit_level

JUDGED, HELD_OUT = 200, 20
LEVELS = "works", "partly", "unusable"
# Shares of the source's greedy answers to the judged examples that are right (docs/record/settings-study.md).
SOURCE_RIGHT = {
    ("SNIPS", "SmolLM2-135M-Instruct"): 0.38,
    ("SNIPS", "Qwen2.5-Coder-0.5B-Instruct"): 0.76,
    ("BANKING77", "SmolLM2-135M-Instruct"): 0.545,
}
# The limit of "works" and the one of "unusable".
CHOSEN_ON = {"works": ("BANKING77", "SmolLM2-135M-Instruct"), "unusable": ("SNIPS", "SmolLM2-135M-Instruct")}


def task_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return the task and the source of a fit."""
    return row["data"].removesuffix("_train.jsonl").upper(), row["source"]


def facts_of(row: dict[str, Any], agreed: int, held_out: int) -> FitFacts:
    """Return the facts of a fit on which its level depends."""
    given = 0 if row["texts"].startswith("no prompts") else 200
    return FitFacts(
        answers=200, given=given, held_out=held_out, agreed=agreed, divergence_before=0.0, divergence=row["divergence"]
    )


def draws(row: dict[str, Any]) -> dict[str, float]:
    """Return the probability of each level if 20 of the 200 answers are drawn."""
    right, found = round(row["agreement"] * JUDGED), defaultdict(float)
    for agreed in range(HELD_OUT + 1):
        ways = math.comb(right, agreed) * math.comb(JUDGED - right, HELD_OUT - agreed)
        found[fit_level(facts_of(row, agreed, HELD_OUT))] += ways / math.comb(JUDGED, HELD_OUT)
    return found


def median(found: list[tuple[float, float]]) -> float:
    """Return the median of values with weights."""
    half, total = sum(weight for _, weight in found) / 2, 0.0
    for value, weight in sorted(found):
        total += weight
        if total >= half:
            return value
    return math.nan


def summary(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """Print for each level the range and the median of the shares of the source's right answers."""
    table = Table("level", "by 200: fits", "lowest", "median", "highest", "by 20: fits", "median", title=title)
    for level in LEVELS:
        whole = [row["share"] for row in rows if row["level"] == level]
        drawn = [(row["share"], row["draws"].get(level, 0.0)) for row in rows]
        ends = [f"{one:.2f}" for one in (min(whole), float(np.median(whole)), max(whole))] if whole else [""] * 3
        fits = sum(weight for _, weight in drawn)
        few = f"{median(drawn):.2f}" if fits > 0.05 else ""
        table.add_row(level, str(len(whole)), *ends, f"{fits:.1f}", few)
    console.print(table)


def main() -> None:
    console, rows = wide_console(), [row for group in read_rows().values() for row in group]
    rows = [row for row in rows if not labelled(row) and row["fit"] != "answers"]
    for row in rows:
        agreed = round(row["agreement"] * JUDGED)
        row["share"] = row["right"] / SOURCE_RIGHT[task_of(row)]
        row["level"], row["draws"] = fit_level(facts_of(row, agreed, JUDGED)), draws(row)
        drawn = ", ".join(f"{name} {100 * row['draws'][name]:.0f}" for name in LEVELS if row["draws"][name] > 0.005)
        divergence = "" if row["divergence"] is None else f", {row['divergence']:.3f} nats"
        print(f"{' of '.join(task_of(row))}, {row['texts']}, {row['fit']}: {agreed} of {JUDGED}{divergence}")
        print(f"    {row['level']}; by {HELD_OUT} of them: {drawn} of 100; {row['share']:.2f} of the right answers")
    for level, task in CHOSEN_ON.items():
        chosen = [row for row in rows if task_of(row) == task]
        others = [row for row in rows if task_of(row) != task]
        summary(chosen, f"the limit of {level} was chosen on {' of '.join(task)}", console)
        summary(others, "the others", console)
    summary(rows, "all fits", console)


if __name__ == "__main__":
    main()
