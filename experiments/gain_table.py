"""Make the tables of the share of a trained adapter's gain in docs/results.md from the lines that `gains.py` wrote.

    python experiments/gain_table.py [LINES.jsonl ...] [--check]

Reads `experiments/results/gains/` and writes the tables between two marks of the page; with files it prints the tables
of these instead. With `--check` it writes nothing, and exits with 1 if the page differs from the lines.

The share is (row - base) / (trained - base), of means over items and seeds. Intervals are 95% by a paired bootstrap: a
resample draws items and seeds, the same ones for all rows of a task and pair of bases. A share is left out where the
interval of the trained adapter's gain includes 0. Of several lines of the same row and seed the last one counts.
"""

import argparse
import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from leaderboard import MODELS
from result_lines import FOLDER, GainLine, read_lines

import jcrosslora as jcl
from jcrosslora.evaluate import Interval

GAINS = FOLDER / "gains"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
MARKS = "<!-- made by experiments/gain_table.py -->\n", "<!-- end -->\n"
DRAWS = 10_000
_HEAD = ("from", "to", "adapter on the target", "right", "share of the gain", "minus the source")
_HEAD += ("minus training on the source's answers", "share in likelihood", "seeds")
_LABELS = {
    "base": "none",
    "source": "the source with its adapter",
    "trained": "trained on the target",
    "answers": "trained on the source's answers to {} prompts",
    "answers, torch": "the same by transformers and peft",
}
_ORDER = ("base", "cross-lora", "random", "copy", "distill", "answers", "answers, torch", "source", "trained")
Label: TypeAlias = tuple[str, int]  # row and prompts
Seeds: TypeAlias = dict[int, GainLine]


def tables(lines: Iterable[GainLine]) -> str:
    """Return the tables of all tasks as Markdown; raises UsageError for lines that are not of test items."""
    by_task: dict[str, dict[tuple[str, str], dict[Label, Seeds]]] = {}
    for line in lines:
        if line.split != "test":
            raise jcl.UsageError(f"a line of {line.task} is of {line.split} items: the tables are of test items alone")
        pair = by_task.setdefault(line.task, {}).setdefault((line.source, line.target), {})
        pair.setdefault((line.row, line.prompts), {})[line.seed] = line
    parts = []
    for task, pairs in sorted(by_task.items()):
        first = next(iter(next(iter(next(iter(pairs.values())).values())).values()))
        right = "right answers chosen" if first.measure == "accuracy" else "answers equal to the label"
        rows = [row for names, rows in sorted(pairs.items()) for row in _rows(names, rows)]
        table = "".join(f"| {' | '.join(row)} |\n" for row in (_HEAD, ("---",) * len(_HEAD), *rows))
        parts.append(f"{task.upper().replace('_', '-')}, {len(first.right)} items, {right}:\n\n{table}")
    return "\n".join(parts)


def means(values: np.ndarray) -> np.ndarray:
    """float64 (K, 1 + DRAWS): means over seeds and items of K rows (K, S, n), and those of resamples of both."""
    drawn, picked = _resamples(*values.shape[1:])
    found = np.einsum("ksd,ds->kd", values @ drawn.T, picked)
    return np.concatenate([values.mean(axis=(1, 2))[:, None], found], axis=1)


@functools.lru_cache(maxsize=8)
def _resamples(seeds: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the weights of items (DRAWS, n) and of seeds (DRAWS, S) of each resample."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(items, np.full(items, 1 / items), DRAWS) / items
    return drawn, rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds


def share(base: np.ndarray, moved: np.ndarray, trained: np.ndarray) -> Interval | None:
    """Compute (moved - base) / (trained - base), each (S, n); None where the trained one's gain is not sure."""
    base_means, moved_means, trained_means = means(np.stack([base, moved, trained]))
    gains = trained_means - base_means
    if _interval(gains).low <= 0:
        return None
    # A resample without a gain has no share; there are few, as the interval of the gain is above 0.
    some = gains > 0
    return _interval((moved_means - base_means)[some] / gains[some])


def difference(one: np.ndarray, other: np.ndarray) -> Interval:
    """Compute one - other, each (S, n)."""
    found = means(np.stack([one, other]))
    return _interval(found[0] - found[1])


def _interval(found: np.ndarray) -> Interval:
    low, high = np.percentile(found[1:], (2.5, 97.5))
    return Interval(float(found[0]), float(low), float(high))


def _rows(names: tuple[str, str], rows: dict[Label, Seeds]) -> list[tuple[str, ...]]:
    """Make the rows of a pair of bases, of the items that all its lines have."""
    items = max(len(line.right) for seeds in rows.values() for line in seeds.values())
    whole = {
        label: {seed: line for seed, line in seeds.items() if len(line.right) == items} for label, seeds in rows.items()
    }
    found = []
    for label in sorted(filter(whole.get, whole), key=_place):
        own = whole[label]
        row, prompts = label
        right, _ = _values(own)
        cells = [_text(_interval(means(right[None])[0])), "", "", "", ""]
        if row not in ("base", "trained"):
            cells[1], cells[4] = (_share(whole, label, likelihood) for likelihood in (False, True))
        if row not in ("base", "source"):
            cells[2] = _minus(whole, label, ("source", 0))
        if prompts and row != "answers":
            cells[3] = _minus(whole, label, ("answers", prompts))
        name = _LABELS.get(row, f"`{row}`, {f'{prompts} prompts' if prompts else 'no data'}").format(prompts)
        models = (MODELS.get(name, name) for name in names)
        found.append((*models, name, *cells, ", ".join(map(str, sorted(own)))))
    return found


def _place(label: Label) -> tuple[int, str, int]:
    row, prompts = label
    name = row.partition(":")[0]
    return _ORDER.index(name) if name in _ORDER else _ORDER.index("distill"), row, prompts


def _values(seeds: Seeds, wanted: Iterable[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """float64 (S, n) each: right answers, and minus the NLL a character, of the seeds in their order."""
    lines = [seeds[seed] for seed in sorted(seeds if wanted is None else wanted)]
    right = np.array([[digit == "1" for digit in line.right] for line in lines], float)
    return right, -np.array([line.nll_per_char for line in lines])


def _share(rows: dict[Label, Seeds], label: Label, likelihood: bool) -> str:
    parts: Sequence[Seeds] = [rows.get(("base", 0), {}), rows[label], rows.get(("trained", 0), {})]
    common = set.intersection(*map(set, parts))
    if not common:
        return ""
    found = share(*(_values(part, common)[likelihood] for part in parts))
    return "" if found is None else f"**{found.value:.2f}** [{found.low:.2f}, {found.high:.2f}]"


def _minus(rows: dict[Label, Seeds], label: Label, other: Label) -> str:
    common = rows[label].keys() & rows.get(other, {}).keys()
    if not common:
        return ""
    return _text(difference(*(_values(rows[one], common)[0] for one in (label, other))), "+")


def _text(found: Interval, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def filled(page: str, made: str) -> str:
    """Put tables between the marks of a page; raises UsageError where it has no marks."""
    begin, end = MARKS
    before, first, rest = page.partition(begin)
    _, second, after = rest.partition(end)
    if not first or not second:
        msg = f"{PAGE}: has no lines {begin.strip()} and {end.strip()}: put them where the tables belong"
        raise jcl.UsageError(msg)
    return f"{before}{begin}\n{made}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", type=Path, nargs="*")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    try:
        paths = arguments.lines or sorted(GAINS.glob("*.jsonl"))
        made = tables(line for path in paths for line in read_lines(path, GainLine))
        page = PAGE.read_text(encoding="utf-8")
        whole = page if arguments.lines else filled(page, made)
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"gain_table: {error}")
    if arguments.lines:
        print(made)
    elif not arguments.check:
        PAGE.write_text(whole, encoding="utf-8")
    elif whole != page:
        sys.exit("gain_table: docs/results.md differs from experiments/results/gains: run the script without --check")


if __name__ == "__main__":
    main()
