"""Draw the packages and the way of the data for docs/architecture.md, from its table and from the imports themselves.

    python tools/draw_architecture.py

writes docs/images/packages.svg and docs/images/data-flow.svg. A package stands above all that it imports from. An arrow
that follows from others (a to c, where there are a to b and b to c) is left out.
"""

import argparse
import ast
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE, PAGE, IMAGES = ROOT / "jcrosslora", ROOT / "docs" / "architecture.md", ROOT / "docs" / "images"
WIDTH, BOX, HEIGHT, ROW = 880, 124, 34, 74
STYLE = """<style>
    .box { fill: #eef2fb; stroke: #5b76b8; stroke-width: 1.5 }
    .line { stroke: #7a828e; stroke-width: 1.2; fill: none; opacity: 0.75 }
    .tip { fill: #7a828e }
    text { fill: #1f2530; font-size: 14px; text-anchor: middle }
    .small { font-size: 12px; fill: #4d5663 }
    @media (prefers-color-scheme: dark) {
      .box { fill: #1d2740; stroke: #7f9be0 }
      .line { stroke: #9aa4b2 } .tip { fill: #9aa4b2 }
      text { fill: #e8ecf3 } .small { fill: #b4bdca }
    }
  </style>
  <defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto"><path
    class="tip" d="M0 0 10 5 0 10z"/></marker></defs>"""
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
# Steps from left to right; those below one another are the two kinds of method.
STEPS = (
    (("open", "paths, ids, objects"),),
    (("relate", "how the bases are related"),),
    (("maps", "evidence, align, shift"), ("fit", "write, teach, train")),
    (("restrict", "what the format holds"),),
    (("write", "adapter, report, card"),),
)


def rooms() -> list[str]:
    """Return the packages in the order of the page's table, from the top."""
    return re.findall(r"^\| `(\w+)/` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def imported(room: str) -> set[str]:
    """Return the packages that the files of a package import from."""
    found = set()
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jcrosslora."):
                found.add(node.module.split(".")[1])
    return found - {room, "errors"}


def reduced(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Leave out the arrows that follow from others."""

    def below(room: str) -> set[str]:
        return edges[room].union(*(below(one) for one in edges[room]))

    return {room: ends - set().union(*(below(one) for one in ends)) for room, ends in edges.items()}


def levels(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the packages from the top, each as low as what it imports from allows."""
    height: dict[str, int] = {}
    for room in reversed(list(edges)):
        height[room] = 1 + max((height[one] for one in edges[room]), default=-1)
    return [[room for room in edges if height[room] == level] for level in range(max(height.values()), -1, -1)]


def svg(height: int, title: str, parts: Iterable[str]) -> str:
    """Return a picture with a title for those who cannot see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t"'
    return (
        "\n  ".join([f'{head} font-family="{FONT}">', f'<title id="t">{title}</title>', STYLE, *parts]) + "\n</svg>\n"
    )


def box(x: float, y: float, width: int, label: str, below: str = "") -> str:
    """Draw a box around a point, with a label and a line under it."""
    rect = f'<rect class="box" x="{x - width / 2:g}" y="{y - HEIGHT / 2:g}" width="{width}" height="{HEIGHT}" rx="8"/>'
    small = f'<text class="small" x="{x:g}" y="{y + HEIGHT / 2 + 16:g}">{below}</text>' if below else ""
    return f'{rect}<text x="{x:g}" y="{y + 5:g}">{label}</text>{small}'


def packages() -> str:
    """Draw the packages in levels, with an arrow to what each imports from."""
    names = rooms()
    edges = {room: {one for one in imported(room) if one in names} for room in names}
    places = {}
    rows = levels(edges)
    for level, row in enumerate(rows):
        for number, room in enumerate(row):
            places[room] = (WIDTH * (number + 1) / (len(row) + 1), 30 + ROW * level)
    lines = []
    for room, ends in reduced(edges).items():
        for end in sorted(ends, key=names.index):
            (x, y), (u, v) = places[room], places[end]
            start, stop = y + HEIGHT / 2, v - HEIGHT / 2
            path = f"M{x:g} {start:g} L{u:g} {stop:g}"
            if v - y > ROW:  # around the boxes between the two
                lane = min(x, u) - BOX / 2 - 0.35 * (v - y)
                path = f"M{x - BOX / 2:g} {y:g} C{lane:g} {y:g} {lane:g} {v:g} {u - BOX / 2:g} {v:g}"
            lines.append(f'<path class="line" d="{path}" marker-end="url(#a)"/>')
    boxes = [box(x, y, BOX, room) for room, (x, y) in places.items()]
    return svg(
        60 + ROW * (len(rows) - 1), "The packages of jcrosslora, each above those it imports from", lines + boxes
    )


def data_flow() -> str:
    """Draw the steps of a transfer."""
    places = [
        [(90 + 175 * column, 100 + 90 * (row - (len(step) - 1) / 2)) for row in range(len(step))]
        for column, step in enumerate(STEPS)
    ]
    lines = [
        f'<path class="line" d="M{x + BOX / 2:g} {y:g} L{u - BOX / 2:g} {v:g}" marker-end="url(#a)"/>'
        for left, right in itertools.pairwise(places)
        for x, y in left
        for u, v in right
    ]
    boxes = [
        box(*place, BOX, *texts)
        for step, row in zip(STEPS, places, strict=True)
        for texts, place in zip(step, row, strict=True)
    ]
    return svg(200, "A transfer: open, relate, map or fit, restrict to the format, write", lines + boxes)


PICTURES = {"packages.svg": packages, "data-flow.svg": data_flow}

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw(), encoding="utf-8")
