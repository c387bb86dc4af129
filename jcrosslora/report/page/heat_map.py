"""The heat map: the size of the moved update by layer and kind of module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jcrosslora.report.page.moved import Moved
from jcrosslora.report.page.theme import LINE, MOVED, MUTED, numbered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Where is the update large?"
_STEPS = 5  # of the scale below the picture


def heat_height(moved: Moved) -> float:
    """Return the height of the picture in inches."""
    return 1.25 + 0.27 * len(moved.norms())


def draw_heat_map(axes: Axes, moved: Moved) -> None:
    """Draw a cell for each role and layer, the stronger the colour the larger; a cell without colour has no update."""
    norms = moved.norms()
    largest = max((norm for of_role in norms.values() for norm in of_role.values()), default=0.0)
    count = max(len(moved.layers), *(layer + 1 for of_role in norms.values() for layer in of_role))
    for place, of_role in enumerate(norms.values()):
        for layer, norm in of_role.items():
            _cell(axes, layer, place, norm / largest if largest else 0.0)
    bottom = len(norms) + 1.35
    for step in range(_STEPS + 1):
        left = count * (0.30 + 0.12 * step)
        _cell(axes, left, bottom, step / _STEPS, count * 0.12)
        axes.text(left + count * 0.06, bottom + 1.15, f"{largest * step / _STEPS:.2g}", ha="center", va="top",
                  color=MUTED, fontsize=9)  # fmt: skip
    axes.text(0, bottom + 0.5, "size (norm)", va="center", color=MUTED, fontsize=9)
    axes.set_yticks([place + 0.5 for place in range(len(norms))], list(norms))
    shown = numbered(count)
    axes.set_xticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("layer of the target")
    axes.tick_params(length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlim(0, count)
    axes.set_ylim(bottom + 2.2, 0)
    for side in axes.spines.values():
        side.set_visible(False)


def _cell(axes: Axes, left: float, top: float, share: float, width: float = 1.0) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, top), width, 1, facecolor=(MOVED, share), edgecolor=LINE, linewidth=0.5))
