"""Print the comparison of two bases, for `jcrosslora compare`."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from jcrosslora.relation import Part, TensorComparison
from jcrosslora.relation.base_comparison import BaseComparison
from jcrosslora.utils.terminal import say

_SHOWN_LAYERS = 40  # a longer map of layers is cut


def print_comparison(relation: BaseComparison, console: Console) -> None:
    """Print the comparison of each part and of each kind of tensor, and the relation last."""
    if relation.parts:
        _print_parts(relation.parts, console)
        _print_compared(relation.compared, console)
    if relation.layers and relation.layers != tuple(range(len(relation.layers))):
        layers = ["-" if layer is None else str(layer) for layer in relation.layers]
        more = ", ..." if len(layers) > _SHOWN_LAYERS else ""
        say(console, f"source layer of each target layer: {','.join(layers[:_SHOWN_LAYERS])}{more}")
    for note in relation.notes:
        say(console, f"note: {note}")
    say(console, f"method: auto would take {relation.choice.method}, because {relation.choice.reason}")
    say(console, f"evidence: {relation.sentence}")
    say(console, f"relation: {', '.join(relation.words)}", style="bold")


def _print_parts(parts: Sequence[Part], console: Console) -> None:
    table = Table("part", title="parts of the target, found in the source", title_justify="left")
    for name in ("found", "of target", "used", "of source"):
        table.add_column(name, justify="right")
    table.add_column("order")
    for part in parts:
        order = "repeated" if part.repeated else "same" if part.in_order else "other"
        table.add_row(part.name, *(f"{n:,}" for n in (part.found, part.target, part.used, part.source)), order)
    console.print(table, highlight=False, markup=False)


def _print_compared(compared: Sequence[TensorComparison], console: Console) -> None:
    table = Table("tensors", "change", title="weights, by sampled rows", title_justify="left")
    for name in ("n", "distance", "cosine", "equal", "rounding explains", "rank", "scale"):
        table.add_column(name, justify="right")
    table.add_column("stored on")
    for (role, change, grids), items in _grouped(compared).items():
        found = [item.difference for item in items]
        ranks = [str(item.rank) for item in found if item.rank is not None]
        table.add_row(
            role,
            change,
            str(len(items)),
            f"{np.mean([item.distance for item in found]):.2%}",
            f"{np.mean([item.cosine for item in found]):.4f}",
            f"{np.mean([item.equal for item in found]):.1%}",
            f"{min(item.explained for item in found):.2%}",
            "-" if not ranks else ranks[0] if len(set(ranks)) == 1 else f"{min(ranks, key=int)}-{max(ranks, key=int)}",
            f"{np.mean([item.scale for item in found]):.4g}",
            grids[0] if grids[0] == grids[1] else f"{grids[0]} > {grids[1]}",
        )
    console.print(table, highlight=False, markup=False)


def _grouped(compared: Sequence[TensorComparison]) -> dict[tuple[str, str, tuple[str, str]], list[TensorComparison]]:
    groups: dict[tuple[str, str, tuple[str, str]], list[TensorComparison]] = {}
    for item in compared:
        key = item.role, item.difference.change, item.difference.grids
        groups.setdefault(key, []).append(item)
    order = {role: place for place, role in enumerate(dict.fromkeys(item.role for item in compared))}
    return dict(sorted(groups.items(), key=lambda entry: order[entry[0][0]]))
