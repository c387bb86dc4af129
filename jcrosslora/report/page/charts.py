"""The pictures of a page: bars of an evaluation, the curve of a fit, a map of the layers, a heat map of the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jcrosslora.report.page.evaluation import Evaluation
from jcrosslora.report.page.headline import FIGURES, main_figures
from jcrosslora.report.page.layers import layer_norms, layer_of, left_shares, source_shares, target_shares
from jcrosslora.report.page.theme import BASE, INK, LEFT, LINE, MOVED, MUTED, OTHER, TRAINED, numbered
from jcrosslora.report.record import TransferReport
from jcrosslora.utils.texts import shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_HEIGHT, MAP_HEIGHT = 2.9, 3.6  # inches
_COLOURS = {"base": BASE, "moved": MOVED, "trained": TRAINED}
_LONGEST = 22  # letters of a model's name
_STEPS = 5  # of the scale below the heat map
_BAR = 0.3  # height of the tallest bar of a layer, of the distance of the two rows


def bars_height(evaluation: Evaluation) -> list[float]:
    """Return the height of each panel in inches, one for each figure that is shown."""
    return [0.75 + 0.3 * len(evaluation.models)] * len(main_figures(evaluation))


def draw_bars(panels: list[Axes], evaluation: Evaluation) -> None:
    """Draw a panel for each figure: a bar for each model, a whisker for its interval, and both as numbers."""
    from matplotlib.transforms import blended_transform_factory

    for axes, name in zip(panels, main_figures(evaluation), strict=True):
        shown, models = FIGURES[name], evaluation.models
        found = [model.figures[name] for model in models]
        places = range(len(models))
        axes.barh(places, [one.value for one in found], 0.62, color=[_COLOURS.get(one.part, OTHER) for one in models])
        # Rounding makes some lengths negative.
        whiskers = [[max(0.0, one.value - one.low) for one in found], [max(0.0, one.high - one.value) for one in found]]
        axes.errorbar([one.value for one in found], places, xerr=whiskers, fmt="none", ecolor=INK)
        for place, one in zip(places, found, strict=True):
            axes.text(1.03, place, shown.interval(one), transform=axes.get_yaxis_transform(), va="center", fontsize=10)
        axes.set_yticks(places, [shortened(visible(model.title), _LONGEST) for model in models])
        axes.invert_yaxis()
        axes.set_xlim(0, shown.top or max(*(one.high for one in found), 1e-9) * 1.05)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=9)
        axes.locator_params(axis="x", nbins=4)
        better = "lower" if shown.lower else "higher"
        axes.set_title(" \n ", linespacing=1.3)  # room for a title that begins at the edge of the picture
        edge = blended_transform_factory(axes.figure.transSubfigure, axes.transAxes)
        title = axes.text(
            0.01, 1.05, f"{shown.title}\n{better} is better", transform=edge, va="bottom", linespacing=1.3
        )
        title.set_in_layout(False)


def draw_curve(axes: Axes, curve: Sequence[tuple[int, float]]) -> None:
    """Draw the divergence at each look in nats, over the completions used, which may be gone through again."""
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


def draw_layer_map(axes: Axes, report: TransferReport) -> None:
    """Draw the source's layers below and the target's above, a line for each that feeds another, and shares as bars."""
    shares = source_shares(report)
    fed = {layer for layer in report.layers if layer is not None}
    count_src = max((*fed, *shares)) + 1
    count_tgt = max(len(report.layers), *(layer_of(row.target) + 1 for row in report.rows))
    for layer, source in enumerate(report.layers):
        if source is not None:
            ends = [_place(source, count_src), _place(layer, count_tgt)]
            axes.plot(ends, [0, 1], color=LINE, linewidth=1.1, zorder=0)
    above, below = (count_tgt, 1.0, _BAR), (count_src, 0.0, -_BAR)
    _draw_shares(axes, above, target_shares(report), MOVED)
    _draw_shares(axes, below, shares, BASE)
    _draw_shares(axes, below, left_shares(report), LEFT, max(shares.values(), default=1.0))
    axes.scatter([_place(layer, count_tgt) for layer in range(count_tgt)], [1.0] * count_tgt, 9, color=MOVED, zorder=3)
    places, colours = range(count_src), [BASE if layer in fed else LEFT for layer in range(count_src)]
    axes.scatter([_place(layer, count_src) for layer in places], [0.0] * count_src, 9, color=colours, zorder=3)
    for count, height, side in ((count_tgt, 1 + _BAR + 0.04, "bottom"), (count_src, -_BAR - 0.04, "top")):
        for layer in numbered(count):
            axes.text(_place(layer, count), height, str(layer), ha="center", va=side, color=MUTED, fontsize=9)
    axes.text(0, 1 + _BAR + 0.2, "layers of the target (the new model)", va="bottom")
    axes.text(0, -_BAR - 0.2, "layers of the source (the old model)", va="top")
    axes.set_xlim(0, 1)
    axes.set_ylim(-_BAR - 0.42, 1 + _BAR + 0.42)
    axes.axis("off")


def _draw_shares(
    axes: Axes, row: tuple[int, float, float], shares: Mapping[int, float], colour: str, tallest: float = 0.0
) -> None:
    """Draw the share of each layer as a bar.

    A row is the number of its layers, where it lies, and the height of a bar of share `tallest` (0 is the largest
    share), below 0 for bars downwards.
    """
    count, start, height = row
    top = tallest or max(shares.values(), default=0.0) or 1.0
    heights = [height * share / top for share in shares.values()]
    axes.bar([_place(layer, count) for layer in shares], heights, 0.7 / count, start, color=colour)


def _place(layer: int, count: int) -> float:
    return (layer + 0.5) / count


def heat_height(report: TransferReport) -> float:
    """Return the height of the picture in inches."""
    return 1.25 + 0.27 * len(layer_norms(report))


def draw_heat_map(axes: Axes, report: TransferReport) -> None:
    """Draw a cell for each role and layer, the stronger the colour the larger; a cell without colour has no update."""
    norms = layer_norms(report)
    largest = max((norm for of_role in norms.values() for norm in of_role.values()), default=0.0)
    count = max(len(report.layers), *(layer + 1 for of_role in norms.values() for layer in of_role))
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
