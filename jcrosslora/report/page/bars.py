"""Bars: each figure of an evaluation under each model, with its 95% interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jcrosslora.report.page.evaluation import Evaluation
from jcrosslora.report.page.figures import FIGURES, main_figures
from jcrosslora.report.page.theme import BASE, INK, MOVED, OTHER, TRAINED
from jcrosslora.utils.texts import shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Does it work?"
_COLOURS = {"base": BASE, "moved": MOVED, "trained": TRAINED}
_LONGEST = 22  # letters of a model's name


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
        below, above = [one.value - one.low for one in found], [one.high - one.value for one in found]
        axes.errorbar(
            [one.value for one in found], places, xerr=[_positive(below), _positive(above)], fmt="none", ecolor=INK
        )
        for place, one in zip(places, found, strict=True):
            axes.text(1.03, place, shown.interval(one), transform=axes.get_yaxis_transform(), va="center", fontsize=10)
        axes.set_yticks(places, [_short(model.title) for model in models])
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


def _positive(lengths: list[float]) -> list[float]:
    """Clip what rounding made negative."""
    return [max(0.0, length) for length in lengths]


def _short(name: str) -> str:
    return shortened(visible(name), _LONGEST)
