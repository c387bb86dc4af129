"""Check that the tables of README.md and of pages that report results state no figure that no line of results has.

    python experiments/page_figures.py

A row of a table of jobs has the figures of a line of `experiments/results/`, rounded: of seed 0, or of that which its
name ends in, such as ", seed 1". A row of another table has those of the lines of `experiments/results/stated/` that
name its section and its first cell. A number is a decimal or a percentage; counts are not looked at, nor is the text
around the tables. The tables that `gain_table.py` writes are left to its own check.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gain_table import MARKS
from result_lines import FOLDER, STATED, ResultLine, StatedLine, read_lines

import jcrosslora as jcl
from jcrosslora.evaluate import Interval

ROOT = Path(__file__).parent.parent
REPORTING = "results", "record/all-results", "compressed-bases", "composition", "shelf"  # pages of docs/
PAGES = ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in REPORTING)
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+|(?:\.\d+)?%)")
_SOURCES = re.compile(r"\]\([^)]*\)|arXiv [\d.]+")  # addresses of links, and papers
# The tables of jobs by their first cell: the task, and what the name of the source begins with.
_JOBS = {
    "SNIPS": ("snips", "Smollm2"),
    "SNIPS, 200 examples": ("snips", "Smollm2"),
    "BANKING77": ("banking77", "Smollm2"),
    "E2E": ("e2e", "Smollm2"),
    "SNIPS, the other way": ("snips", "Gemma"),
    "BANKING77, the other way": ("banking77", "Gemma"),
    "E2E, the other way": ("e2e", "Gemma"),
}
# How the rows of jobs are called, and which figure of which move they show.
_PARTS = {
    "Gemma": ("base", None),
    "SmolLM2": ("base", None),
    "trained on Gemma": ("trained", None),
    "trained on SmolLM2": ("trained", None),
    "`cross-lora`": ("moved", ("cross-lora", 0)),
    "`random`": ("moved", ("random", 0)),
    "SmolLM2 with the adapter that is moved": ("source", None),
    "Gemma with the adapter that is moved": ("source", None),
    "trained on Gemma, on SmolLM2's answers to the 200 prompts": ("moved", ("answers", 200)),
    "`distill`, no data": ("moved", ("distill", 0)),
    "`distill`, no data, 1,200 completions": ("moved", ("distill:completions=1200", 0)),
    "`distill`, 200 prompts": ("moved", ("distill", 200)),
    "`distill`, 1,000 prompts, 1,000 completions": ("moved", ("distill:completions=1000", 1000)),
}
_FIGURES = {"nats a character": ("nll_per_char",), "right": ("json", "exact"), "chrF": ("chrf",), "ended": ("ended",)}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        section: the heading above it.
        head: the cells of the table's first row.
        cells: its own.
    """

    section: str
    head: tuple[str, ...]
    cells: tuple[str, ...]

    @property
    def label(self) -> str:
        """Return what it is called."""
        return self.cells[0]

    def numbers(self) -> list[str]:
        """Return the decimals and percentages behind its first cell."""
        return [number for cell in self.cells[1:] for number in _NUMBER.findall(_SOURCES.sub("", cell))]


def rows_of(text: str) -> Iterator[Row]:
    """Yield the rows of the tables of a page that hold a decimal or a percentage."""
    section, head = "", ()
    before, begin, made = text.partition(MARKS[0])
    for line in (before + made.partition(MARKS[1])[2] if begin else text).splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|"):
            head = ()
            continue
        cells = tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
        row = Row(section, head, cells)
        if not head:
            head = cells
        elif row.numbers():
            yield row


def unknown(text: str, lines: Sequence[ResultLine], stated: Sequence[StatedLine]) -> list[str]:
    """Say of each row of a page what figures no line has, one sentence each."""
    found = []
    for row in rows_of(text):
        job = _JOBS.get(row.head[0])
        if job is None:
            missing = _not_stated(row, stated)
        else:
            missing = _not_rounded(row, [one for one in lines if one.task == job[0] and one.source.startswith(job[1])])
        if missing:
            found.append(f"{row.section}, {row.label}: no line has {', '.join(missing)}")
    return found


def unused(texts: Iterable[str], stated: Sequence[StatedLine]) -> list[str]:
    """Name the rows of lines that no page has."""
    shown = {(row.section, row.label) for text in texts for row in rows_of(text)}
    return [f"{one.section}, {label}" for one in stated for label in one.rows if (one.section, label) not in shown]


def _not_stated(row: Row, stated: Sequence[StatedLine]) -> list[str]:
    lines = [one for one in stated if one.section == row.section and row.label in one.rows]
    known = Counter(number for line in lines for figure in line.figures.values() for number in figure.numbers())
    missing = []
    for number in row.numbers():
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        if known[value] == 0:
            missing.append(number)
        known[value] -= 1
    return missing


def _not_rounded(row: Row, lines: Sequence[ResultLine]) -> list[str]:
    """Compare the cells with the figures of the first line that has them, in the cells' own digits."""
    label, _, seed = row.label.partition(", seed ")
    if label not in _PARTS:
        return row.numbers()
    part, move = _PARTS[label]
    fitting = [one for one in lines if one.seed == int(seed or 0) and move in (None, (one.method, one.prompts))]
    missing = []
    for title, cell in zip(row.head[1:], row.cells[1:], strict=True):
        numbers = _NUMBER.findall(cell)
        known = [one for line in fitting if (one := _shown(line, part, title)) is not None]
        if numbers and not any(_rounded(one, numbers) for one in known):
            missing += numbers
    return missing


def _shown(line: ResultLine, part: str, title: str) -> Interval | None:
    if title == "lift":
        return line.figures["nll_per_char"].lift
    found = next((line.figures[name] for name in _FIGURES.get(title, ()) if name in line.figures), None)
    return None if found is None else getattr(found, part)


def _rounded(found: Interval, numbers: Sequence[str]) -> bool:
    wanted = (found.value, found.low, found.high)
    return all(f"{value:.{len(one.partition('.')[2])}f}" == one for value, one in zip(wanted, numbers, strict=False))


def main() -> None:
    try:
        lines = [line for path in sorted(FOLDER.glob("*.jsonl")) for line in read_lines(path)]
        stated = [line for path in sorted(STATED.glob("*.jsonl")) for line in read_lines(path, StatedLine)]
        texts = [page.read_text(encoding="utf-8") for page in PAGES]
    except (jcl.JCrossLoRAError, OSError) as error:
        sys.exit(f"page_figures: {error}")
    faults = [fault for text in texts for fault in unknown(text, lines, stated)]
    faults += [f"no page has the row {name} of the lines" for name in unused(texts, stated)]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
