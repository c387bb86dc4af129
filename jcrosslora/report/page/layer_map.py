"""The layer map: which layer of the source feeds which of the target, and how much of the update each of them holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jcrosslora.report.page.moved import Moved, layer_of
from jcrosslora.report.page.theme import BASE, LEFT, LINE, MOVED, MUTED, numbered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Which layer became which?"
HEIGHT = 3.6
_BAR = 0.3  # height of the tallest bar, of the distance of the two rows


def has_map(moved: Moved) -> bool:
    """Tell whether the layers of the source are known; those of a source that was asked are not."""
    return any(layer is not None for layer in moved.layers)


def draw_layer_map(axes: Axes, moved: Moved) -> None:
    """Draw the source's layers below and the target's above, a line for each that feeds another, and shares as bars."""
    shares, left, target_shares = moved.source_shares(), moved.left_behind(), moved.target_shares()
    fed = {layer for layer in moved.layers if layer is not None}
    count_src = max((*fed, *shares)) + 1
    count_tgt = max(len(moved.layers), *(layer_of(row.target) + 1 for row in moved.rows))

    def place(layer: int, count: int) -> float:
        return (layer + 0.5) / count

    for layer, source in enumerate(moved.layers):
        if source is not None:
            axes.plot([place(source, count_src), place(layer, count_tgt)], [0, 1], color=LINE, linewidth=1.1, zorder=0)
    _bars(axes, {place(layer, count_tgt): share for layer, share in target_shares.items()}, count_tgt, 1.0, MOVED)
    _bars(axes, {place(layer, count_src): share for layer, share in shares.items()}, count_src, 0.0, BASE, down=True)
    tallest = max(shares.values(), default=1.0)
    _bars(axes, {place(layer, count_src): share for layer, share in left.items()}, count_src, 0.0, LEFT, True, tallest)
    axes.scatter([place(layer, count_tgt) for layer in range(count_tgt)], [1.0] * count_tgt, 9, color=MOVED, zorder=3)
    colours = [BASE if layer in fed else LEFT for layer in range(count_src)]
    axes.scatter([place(layer, count_src) for layer in range(count_src)], [0.0] * count_src, 9, color=colours, zorder=3)
    for count, height, side in ((count_tgt, 1 + _BAR + 0.04, "bottom"), (count_src, -_BAR - 0.04, "top")):
        for layer in numbered(count):
            axes.text(place(layer, count), height, str(layer), ha="center", va=side, color=MUTED, fontsize=9)
    axes.text(0, 1 + _BAR + 0.2, "layers of the target (the new model)", va="bottom")
    axes.text(0, -_BAR - 0.2, "layers of the source (the old model)", va="top")
    axes.set_xlim(0, 1)
    axes.set_ylim(-_BAR - 0.42, 1 + _BAR + 0.42)
    axes.axis("off")


def _bars(
    axes: Axes,
    shares: dict[float, float],
    count: int,
    start: float,
    colour: str,
    down: bool = False,
    tallest: float | None = None,
) -> None:
    """Draw shares as bars at places along a row of `count` layers, upwards or downwards from `start`."""
    top = tallest or max(shares.values(), default=0.0) or 1.0
    heights = [(-_BAR if down else _BAR) * share / top for share in shares.values()]
    axes.bar(list(shares), heights, 0.7 / count, start, color=colour)
