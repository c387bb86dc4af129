"""Draw whether agreement predicts right answers: all fits of `experiments/results/fits/`, by pair of bases and task.

    python experiments/agreement.py

Agreement needs no labels: it is the share of the source's greedy answers that the target would write. Prints the rank
correlation of the share of right answers with it and with the likelihood, over the fits of each pair and task and over
all fits, and writes docs/images/agreement.svg. Rows of no fit are left out; those of adapters that were trained on
labels are drawn hollow and not counted, as they imitate no source.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS, IMAGE = ROOT / "experiments" / "results" / "fits", ROOT / "docs" / "images" / "agreement.svg"
SIDE, MARGIN = 320, 52  # pixels of a panel, and around it
COLOURS = "#2f6fb0", "#c2571a", "#3d8b57", "#8a5bb0"
Rows = Sequence[dict[str, Any]]


def read_rows() -> dict[str, list[dict[str, Any]]]:
    """Read the rows of fits, by pair and task."""
    found = defaultdict(list)
    for path in sorted(RESULTS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["fit"] != "none":
                task = row["data"].removesuffix("_train.jsonl").upper()
                found[f"{task}, {row['source']} to {row['target']}"].append(row)
    return found


def labelled(row: dict[str, Any]) -> bool:
    """Check whether labels were used."""
    return row["fit"] == "trained" or row["texts"] == "labels"


def rank_correlation(rows: Rows, key: str) -> float:
    """Return the correlation of the ranks of a figure and of "right"; equal values share their mean rank."""

    def ranks(name: str) -> np.ndarray:
        values = np.array([row[name] for row in rows])
        return np.array([((values < one).sum() + (values <= one).sum() - 1) / 2 for one in values])

    return float(np.corrcoef(ranks(key), ranks("right"))[0, 1])


def panel(left: int, groups: dict[str, list[dict[str, Any]]], key: str, label: str) -> list[str]:
    """Draw "right" over a figure, each group in its colour."""
    every = [row[key] for rows in groups.values() for row in rows]
    low, high = min(every), max(every)
    top = max(row["right"] for rows in groups.values() for row in rows)

    def x(value: float) -> float:
        return left + MARGIN + (value - low) / (high - low) * SIDE

    def y(value: float) -> float:
        return MARGIN + (1 - value / top) * SIDE

    parts = [f'<rect class="frame" x="{left + MARGIN - 8}" y="{MARGIN - 8}" width="{SIDE + 16}" height="{SIDE + 16}"/>']
    for share in (0, 0.5, 1):
        value = low + share * (high - low)
        parts.append(f'<text x="{x(value):.0f}" y="{MARGIN + SIDE + 28}">{value:.2f}</text>')
        parts.append(
            f'<text class="end" x="{left + MARGIN - 14}" y="{y(share * top) + 4:.0f}">{share * top:.2f}</text>'
        )
    parts.append(f'<text x="{left + MARGIN + SIDE / 2:.0f}" y="{MARGIN + SIDE + 50}">{label}</text>')
    for colour, rows in zip(COLOURS, groups.values(), strict=False):
        for row in rows:
            fill = "none" if labelled(row) else colour
            place = f'cx="{x(row[key]):.1f}" cy="{y(row["right"]):.1f}"'
            parts.append(f'<circle {place} r="5" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>')
    return parts


def draw(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Draw both panels with their legend."""
    width, height = 2 * (SIDE + 2 * MARGIN), SIDE + 2 * MARGIN + 34 + 22 * len(groups)
    parts = panel(0, groups, "agreement", "agreement with the source's greedy answers")
    parts += panel(SIDE + 2 * MARGIN, groups, "NLL", "NLL of the right answers, nats a token")
    parts.append(f'<text x="{MARGIN}" y="26" class="start">share of right answers</text>')
    for place, (colour, name) in enumerate(zip(COLOURS, groups, strict=False)):
        top = SIDE + 2 * MARGIN + 26 + 22 * place
        parts.append(f'<circle cx="{MARGIN}" cy="{top - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text class="start" x="{MARGIN + 14}" y="{top}">{name}</text>')
    style = """<style>
    text { fill: #1f2530; font: 13px system-ui, sans-serif; text-anchor: middle }
    .start { text-anchor: start } .end { text-anchor: end }
    .frame { fill: none; stroke: #7a828e }
    @media (prefers-color-scheme: dark) { text { fill: #e8ecf3 } .frame { stroke: #9aa4b2 } }
  </style>"""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    title = "Right answers over agreement, and over likelihood, of all fits"
    return f'{head} aria-label="{title}">\n  {style}\n  ' + "\n  ".join(parts) + "\n</svg>\n"


def main() -> None:
    groups = read_rows()
    together = [row for group in groups.values() for row in group]
    for name, rows in {**groups, "all": together}.items():
        counted = [row for row in rows if not labelled(row)]
        if len(counted) > 2:
            by = {key: rank_correlation(counted, key) for key in ("agreement", "NLL")}
            figures = f"{by['agreement']:.2f} with agreement, {by['NLL']:.2f} with the NLL"
            print(f"{name}: over {len(counted)} fits, right answers correlate {figures}")
    IMAGE.write_text(draw(groups), encoding="utf-8")


if __name__ == "__main__":
    main()
