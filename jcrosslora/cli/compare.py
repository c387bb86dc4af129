"""`jcrosslora compare`: how two bases are related."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jcrosslora.cli.output import print_json, say

if TYPE_CHECKING:
    from jcrosslora.relation import BaseComparison, Part, TensorComparison

_SHOWN_LAYERS = 40  # a longer map of layers is cut


@dataclass(frozen=True)
class Compare:
    """Say how two base models are related, from their weights: same, quantised, trained, pruned, ..."""

    source: tyro.conf.Positional[str]
    """The base that an adapter comes from: a folder of safetensors, a GGUF file or a hub id."""
    target: tyro.conf.Positional[str]
    """The base that it would go to (same forms)."""
    source_revision: str | None = None
    """Hub revision of the source."""
    target_revision: str | None = None
    """Hub revision of the target."""
    json: bool = False
    """Print everything as JSON instead, tensor by tensor."""

    def run(self, console: Console) -> None:
        """Compare, and print the evidence and the relation."""
        from jcrosslora.checkpoint import open_base
        from jcrosslora.relation import compare_bases

        source = open_base(self.source, revision=self.source_revision)
        relation = compare_bases(source, open_base(self.target, revision=self.target_revision))
        if self.json:
            print_json(relation.to_json())
        else:
            _print(relation, console)


def _print(relation: "BaseComparison", console: Console) -> None:
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


def _print_parts(parts: Sequence["Part"], console: Console) -> None:
    table = Table("part", title="parts of the target, found in the source", title_justify="left")
    for name in ("found", "of target", "used", "of source"):
        table.add_column(name, justify="right")
    table.add_column("order")
    for part in parts:
        order = "repeated" if part.repeated else "same" if part.in_order else "other"
        table.add_row(part.name, *(f"{n:,}" for n in (part.found, part.target, part.used, part.source)), order)
    console.print(table, highlight=False, markup=False)


def _print_compared(compared: Sequence["TensorComparison"], console: Console) -> None:
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


def _grouped(
    compared: "Sequence[TensorComparison]",
) -> "dict[tuple[str, str, tuple[str, str]], list[TensorComparison]]":
    groups: dict[tuple[str, str, tuple[str, str]], list[TensorComparison]] = {}
    for item in compared:
        groups.setdefault((item.role, item.difference.change, item.difference.grids), []).append(item)
    order = list(dict.fromkeys(item.role for item in compared))
    return dict(sorted(groups.items(), key=lambda entry: order.index(entry[0][0])))
