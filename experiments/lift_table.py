"""The lift table: rows with intervals and spreads from the figures of all seeds, printed or as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jcrosslora.evaluate import Interval, bootstrap_means
from jcrosslora.evaluate.bootstrap import intervals
from jcrosslora.utils.files import write_whole

BASE, ORACLE = "base", "trained on the target"
ACCURACIES = {
    "accuracy": "accuracy",
    "accuracy_norm": "accuracy per character",
    "exact": "exact match",
}
_LOWER = "{} BELOW BASE"


@dataclass(frozen=True)
class Spread:
    """A mean over questions and seeds.

    Attributes:
        interval: the mean with its 95% interval over questions.
        deviation: standard deviation over seeds; None for a single seed.
    """

    interval: Interval
    deviation: float | None

    def text(self, sign: str = "") -> str:
        """Format it for the table."""
        value, low, high = (f"{number:{sign}.3f}" for number in vars(self.interval).values())
        return f"{value} [{low}, {high}]" + ("" if self.deviation is None else f" sd {self.deviation:.3f}")


@dataclass(frozen=True)
class Sheet:
    """A table: title, names of the columns, rows, and notes below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]


def lift(base: np.ndarray, moved: np.ndarray, trained: np.ndarray, *, draws: int = 10_000) -> Spread | None:
    """Compute the share of the trained adapters' gain that the moved ones bring: (base - moved) / (base - trained).

    A ratio of means over questions for each seed, then the mean over seeds; the interval is that of this mean over
    resampled questions, the same ones in numerator and denominator and for all seeds.

    Args:
        base: (n,) a figure of each question, lower is better.
        moved: (S, n) the same of each seed's moved adapter.
        trained: (S, n) the same of each seed's adapter trained on the target.
        draws: number of resamples.

    Returns:
        None where the interval of a trained adapter's gain includes 0 or lies below.
    """
    gains, reached = base - trained, base - moved
    if not all(found.low > 0 for found in intervals(gains, draws=draws)):
        return None
    means, count = bootstrap_means(np.concatenate([reached, gains]), draws=draws), len(gains)
    seeds = reached.mean(axis=1) / gains.mean(axis=1)
    low, high = np.percentile((means[:count] / means[count:]).mean(axis=0), (2.5, 97.5))
    return Spread(Interval(float(seeds.mean()), float(low), float(high)), _deviation(seeds))


def difference(base: np.ndarray, moved: np.ndarray, *, draws: int = 10_000) -> Spread:
    """Compute moved (S, n) minus base (n,): the mean over questions and seeds, as for `lift`."""
    found = moved - base
    return Spread(intervals(found.mean(axis=0)[None], draws=draws)[0], _deviation(found.mean(axis=1)))


def make_sheet(
    title: str, rows: Mapping[str, Mapping[str, np.ndarray]], undefined: Mapping[str, str], accuracies: Sequence[str]
) -> Sheet:
    """Make the table of one task and direction.

    Args:
        title: of the table.
        rows: name -> figure -> (S, n), of `BASE`, of `ORACLE` and of moved adapters.
        undefined: name -> reason why there is no such row.
        accuracies: which of `ACCURACIES` to show.
    """
    names = [part for key in accuracies for part in (ACCURACIES[key], f"{ACCURACIES[key]} - base")]
    header = ("adapter", "nats per character", "lift recovered", "lift, mean of questions", *names, "note")
    lines = [(name, *_cells(name, row, rows, accuracies)) for name, row in rows.items()]
    empty = ("-",) * (len(header) - 2)
    lines += [(name, *empty, "not defined") for name in undefined]
    return Sheet(title, header, lines, [f"{name} is not defined: {why}" for name, why in undefined.items()])


def print_sheet(sheet: Sheet, console: Console) -> None:
    """Print a table."""
    table = Table(title=Text(sheet.title), title_justify="left")
    for name in sheet.header:
        table.add_column(Text(name), overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(Text, row))
    console.print(table)
    for note in sheet.notes:
        console.print(note, highlight=False, markup=False)


def markdown(sheets: Sequence[Sheet], command: str) -> str:
    """Format tables as GitHub's Markdown, below the command that made them."""
    parts = [f"Made by\n\n```sh\n{command}\n```\n"]
    for sheet in sheets:
        lines = [sheet.header, ("---",) * len(sheet.header), *sheet.rows]
        table = "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
        parts += [f"{sheet.title}\n\n{table}\n", *(f"{note}\n" for note in sheet.notes)]
    return "\n".join(parts)


def write_markdown(path: Path, sheets: Sequence[Sheet], command: str) -> None:
    """Write the tables, renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, markdown(sheets, command).encode())


def _cells(
    name: str,
    row: Mapping[str, np.ndarray],
    rows: Mapping[str, Mapping[str, np.ndarray]],
    accuracies: Sequence[str],
) -> list[str]:
    base, trained = rows[BASE], rows[ORACLE]
    cells, notes = [f"{row['nll_pooled'].mean():.4f}"], []
    for figure in ("nll_pooled", "nll_per_char"):
        found = None if name == BASE else lift(base[figure][0], row[figure], trained[figure])
        cells.append("-" if found is None else found.text())
        if found is None and name != BASE:
            notes.append(f"no lift: training gains nothing sure ({figure})")
    for key in accuracies:
        found = None if name == BASE else difference(base[key][0], row[key])
        cells += [f"{row[key].mean():.3f}", "-" if found is None else found.text("+")]
        if found is not None and found.interval.high < 0:
            notes.append(_LOWER.format(ACCURACIES[key]))
    return [*cells, "; ".join(notes)]


def _deviation(seeds: np.ndarray) -> float | None:
    return statistics.stdev(seeds.tolist()) if len(seeds) > 1 else None


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
