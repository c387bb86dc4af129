"""The curve of a fit: how far the moved adapter was from the original one on text kept aside, as the fit went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jcrosslora.report.page.theme import LINE, MOVED, MUTED, numbered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "How did the fit go?"
HEIGHT = 2.9


def draw_curve(axes: Axes, curve: Sequence[tuple[int, float]]) -> None:
    """Draw the divergence at each look, in the order of the looks.

    Args:
        axes: to draw on.
        curve: completions used, which stay the same from one look to the next where they are gone through again, and
            the divergence on held-out ones in nats.
    """
    places, values = range(len(curve)), [divergence for _, divergence in curve]
    last = curve[-1][0]
    again = next(place for place, (used, _) in enumerate(curve) if used == last)
    if again < len(curve) - 1:
        axes.axvspan(again, len(curve) - 1, color=LINE, alpha=0.35, linewidth=0)
        axes.text((again + len(curve) - 1) / 2, 1.02, "the same texts again", color=MUTED, fontsize=9, ha="center",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.plot(places, values, color=MOVED, marker="o", markersize=4, linewidth=1.8)
    for place, sides in ((0, "left"), (len(curve) - 1, "right")):
        axes.annotate(f"{values[place]:.3g}", (place, values[place]), (0, 7), textcoords="offset points", ha=sides)
    axes.set_ylim(0, max(*values, 1e-9) * 1.12)
    shown = numbered(len(curve))
    axes.set_xticks(shown, [f"{curve[place][0]:,}" for place in shown])
    axes.set_xlabel("texts used for the fit so far")
    axes.set_ylabel("difference (nats)")
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", labelsize=9)
