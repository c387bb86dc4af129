"""The pictures of a page, and how they are put on it or on a sheet of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jcrosslora.report.page import bars, curve, heat_map, layer_map
from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.theme import drawing, inline_svg, new_figure, settle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: short, for identifiers.
        title: the question that it answers.
        heights: of its panels, in inches, one below the other.
        draw: draws it on that many axes, within `theme.drawing`.
    """

    name: str
    title: str
    heights: tuple[float, ...]
    draw: Callable[[list[Axes]], None]

    def figure(self) -> Figure:
        """Draw the picture alone; call it within `theme.drawing`."""
        figure = new_figure(sum(self.heights))
        grid = {"height_ratios": self.heights}
        self.draw(list(figure.subplots(len(self.heights), squeeze=False, gridspec_kw=grid)[:, 0]))
        settle(figure)
        return figure

    def svg(self) -> str:
        """Return the picture as an element of the page.

        Raises:
            UsageError: matplotlib is not installed.
        """
        with drawing():
            return inline_svg(self.figure(), self.name, self.title)


def pictures(contents: Contents) -> Iterator[Picture]:
    """Yield the pictures for which there is something to show, in the order of the page."""
    evaluation, moved = contents.evaluation, contents.moved
    if evaluation is not None and (heights := bars.bars_height(evaluation)):
        yield Picture("bars", bars.TITLE, tuple(heights), lambda panels: bars.draw_bars(panels, evaluation))
    if moved is None:
        return
    looks = [(used, divergence) for used, divergence in moved.curve if divergence is not None]
    if len(looks) > 1:
        yield Picture("curve", curve.TITLE, (curve.HEIGHT,), lambda panels: curve.draw_curve(panels[0], looks))
    if moved.rows and layer_map.has_map(moved):
        yield Picture(
            "layers", layer_map.TITLE, (layer_map.HEIGHT,), lambda panels: layer_map.draw_layer_map(panels[0], moved)
        )
    if moved.rows:
        height = heat_map.heat_height(moved)
        yield Picture("heat", heat_map.TITLE, (height,), lambda panels: heat_map.draw_heat_map(panels[0], moved))
