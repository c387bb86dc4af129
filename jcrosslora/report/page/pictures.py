"""The pictures of a report: the question that each answers, its caption, and all of them on a sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from jcrosslora.errors import UsageError
from jcrosslora.report.page import charts
from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.evaluation import Evaluation
from jcrosslora.report.page.headline import headline
from jcrosslora.report.page.layers import source_shares
from jcrosslora.report.page.theme import Format, drawing, file_of, inline_svg, new_figure, settle
from jcrosslora.report.record import TransferReport
from jcrosslora.utils.texts import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The words, and the key: (variable of a colour, what it stands for).
Caption: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]

_ROUNDING = 1e-4  # shares below it are not told from none
_MEANINGS = {
    "base": "without adapter: the target as it is",
    "moved": "moved adapter: the target with the adapter that this page is about",
    "trained": "trained adapter: the target with an adapter that was trained for it on the task's own data; about the "
    "best to hope for",
    "random": "random adapter: as large as the moved one, but random; a move has to do better than this",
    "other": "another adapter",
}
_WORDS = {
    "curve": "How much the target with the moved adapter predicts otherwise than the source with the original one, on "
    "texts that were kept aside. It starts with the target alone; 0 would be no difference. A curve that falls and "
    "then stays level has learned what it can from these texts.",
    "heat": "Each cell is the change that the moved adapter makes to the weights of one kind of module in one layer: "
    "the stronger the colour, the larger; a cell without colour has none. Names with q, k, v and o are parts of the "
    "attention, gate, up and down of the feed-forward part.",
}
_LETTERS = 70  # in a line of the sheet
_LINE, _TITLE = 0.2, 0.35  # inches


@dataclass(frozen=True)
class Picture:
    """A picture, by the question that it answers."""

    name: str
    title: str
    heights: tuple[float, ...]  # of its panels, in inches, one below the other
    draw: Callable[[list[Axes]], None]  # on that many axes, within `theme.drawing`

    def figure(self) -> Figure:
        """Draw the picture alone; call it within `theme.drawing`."""
        figure = new_figure(sum(self.heights))
        grid = {"height_ratios": self.heights}
        self.draw(list(figure.subplots(len(self.heights), squeeze=False, gridspec_kw=grid)[:, 0]))
        settle(figure)
        return figure

    def svg(self) -> str:
        """Return the picture as an element of the page."""
        with drawing():
            return inline_svg(self.figure(), self.name, self.title)


def pictures(contents: Contents) -> Iterator[Picture]:
    """Yield the pictures for which there is something to show, in the order of the page."""
    evaluation, report = contents.evaluation, contents.moved
    if evaluation is not None and (heights := charts.bars_height(evaluation)):
        yield Picture("bars", "Does it work?", tuple(heights), lambda panels: charts.draw_bars(panels, evaluation))
    if report is None:
        return
    looks = [(used, divergence) for used, divergence in report.curve if divergence is not None]
    if len(looks) > 1:
        height = charts.CURVE_HEIGHT
        yield Picture("curve", "How did the fit go?", (height,), lambda panels: charts.draw_curve(panels[0], looks))
    if report.rows and any(layer is not None for layer in report.layers):  # those of a source that was asked are not
        title, height = "Which layer became which?", charts.MAP_HEIGHT
        yield Picture("layers", title, (height,), lambda panels: charts.draw_layer_map(panels[0], report))
    if report.rows:
        title, height = "Where is the update large?", charts.heat_height(report)
        yield Picture("heat", title, (height,), lambda panels: charts.draw_heat_map(panels[0], report))


def caption(name: str, contents: Contents) -> Caption:
    """Describe a picture by its name."""
    if name == "bars" and contents.evaluation is not None:
        return _bars(contents.evaluation)
    if name == "layers" and contents.moved is not None:
        return _layers(contents.moved)
    return _WORDS[name], ()


def _bars(evaluation: Evaluation) -> Caption:
    what = "examples" if evaluation.written else "questions"
    words = f"Means over {evaluation.count:,} {what}. The thin line and the brackets are the 95% interval: where the "
    words += "mean would probably lie if other questions of this kind were asked; more questions make it shorter. Bars "
    words += "whose intervals hardly overlap do differ."
    parts = dict.fromkeys(model.part for model in evaluation.models)
    return words, tuple(("other" if part == "random" else part, _MEANINGS[part]) for part in parts)


def _layers(report: TransferReport) -> Caption:
    words = "A line joins a layer of the source to the layer of the target that takes its place. Bars are the share of "
    words += "the update that each layer holds, in the original adapter (below) and in the moved one (above). "
    left, shares = report.left_behind, source_shares(report)
    if report.fitted:
        without = 1 - sum(shares.values()) if shares else 0.0
        held = f", which held {without:.1%} of the original update," if without > _ROUNDING else ""
        words += "The update was fitted to what the source says with its adapter, so what the layers without a line"
        words += f"{held} do is part of it as well."
    elif left:
        words += f"Layers and modules without a place in the target held {left:.1%} of the original update, which was "
        words += "left behind."
    else:
        words += "Nothing of the original update was left behind."
    key = [("moved", "layer of the target"), ("base", "layer of the source")]
    fed = {layer for layer in report.layers if layer is not None}
    if report.unmapped_sources:
        key.append(("left", "left behind"))
    elif set(range(max(fed, default=0) + 1)) - fed:
        key.append(("left", "layer of the source without a line"))
    return words, tuple(key)


def report_sheet(contents: Contents, form: Format) -> bytes:
    """Draw the sheet, and return the content of its file. The same contents give the same bytes.

    Raises:
        UsageError: there is no picture to draw, or matplotlib is not installed.
    """
    found = list(pictures(contents))
    if not found:
        msg = f"{contents.name}: has nothing to draw: write the page as html"
        raise UsageError(msg)
    verdict = headline(contents)
    lines = [visible(contents.name), f"{verdict.word}: {verdict.sentence}", *map(visible, verdict.reasons)]
    text = [part for line in lines for part in textwrap.wrap(line, _LETTERS)]
    tall = _LINE * (len(text) + 1) + sum(_TITLE + sum(picture.heights) for picture in found)
    with drawing():
        sheet = new_figure(tall)
        sheet.set_facecolor("white")
        sheet.text(0.02, 1 - _LINE / 2 / tall, "\n".join(text), va="top", fontsize=10, linespacing=1.3)
        top = tall - _LINE * (len(text) + 1)
        for picture in found:
            sheet.text(0.02, (top - _TITLE / 2) / tall, picture.title, va="center", fontsize=12, fontweight="bold")
            top -= _TITLE + sum(picture.heights)
            picture.draw([sheet.add_axes(place) for place in _places(picture, top, tall)])
        return file_of(sheet, form)


def _places(picture: Picture, bottom: float, tall: float) -> list[tuple[float, float, float, float]]:
    """Place the panels of a picture that stands so many inches above the bottom of the sheet, as it has them alone."""
    share, start = sum(picture.heights) / tall, bottom / tall
    bounds = [axes.get_position().bounds for axes in picture.figure().axes]
    return [(left, start + low * share, width, height * share) for left, low, width, height in bounds]
