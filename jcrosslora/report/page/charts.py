"""Draw the bars of an evaluation and the curve of a fit, each with a question and a caption; and both on one sheet."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from jcrosslora.errors import UsageError
from jcrosslora.report.page import theme
from jcrosslora.report.page.contents import Contents, Evaluation
from jcrosslora.report.page.headline import FIGURES, headline, main_figures
from jcrosslora.report.page.theme import BASE, INK, LINE, MOVED, MUTED, OTHER, TRAINED, numbered
from jcrosslora.utils.texts import shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Key: TypeAlias = tuple[tuple[str, str], ...]  # (name of a colour in the style sheet, meaning)
_COLOURS = {"base": BASE, "moved": MOVED, "trained": TRAINED}
_LONGEST = 22  # letters of a model's name
_MEANINGS = {
    "base": "without adapter: the target as it is",
    "moved": "moved adapter: the target with the adapter that this page is about",
    "trained": "trained adapter: the target with an adapter that was trained on it for this task; about the best "
    "to expect",
    "random": "random adapter: a random update as large as the moved one; a move has to do better than this",
    "other": "another adapter",
}
_CURVE = (
    "How far the predictions of the target with the moved adapter are from those of the source with the original one, "
    "on held-out texts, during the fit. It starts with the target alone; 0 is no difference. A curve that falls and "
    "then stays level has learned what it can from these texts."
)
_LETTERS = 70  # in a line of the sheet
_LINE, _TITLE = 0.2, 0.35  # inches


@dataclass(frozen=True)
class Picture:
    """A picture, the question that it answers, and the words below it."""

    name: str
    title: str
    heights: tuple[float, ...]  # of its panels in inches, from top to bottom
    draw: Callable[[list[Axes]], None]  # takes an Axes for each panel; call it within `drawing`
    words: str
    key: Key = ()

    def figure(self) -> Figure:
        """Draw the picture alone; call it within `drawing`."""
        figure = theme.new_figure(sum(self.heights))
        grid = {"height_ratios": self.heights}
        self.draw(list(figure.subplots(len(self.heights), squeeze=False, gridspec_kw=grid)[:, 0]))
        theme.settle(figure)
        return figure

    def svg(self) -> str:
        """Return the picture as an element of the page."""
        with theme.drawing():
            return theme.inline_svg(self.figure(), self.name, self.title)


def pictures(contents: Contents) -> Iterator[Picture]:
    """Yield the pictures that have data, in the order of the page."""
    evaluation, report = contents.evaluation, contents.moved
    if evaluation is not None and (shown := main_figures(evaluation)):
        heights = (0.75 + 0.3 * len(evaluation.models),) * len(shown)
        draw = partial(_draw_bars, evaluation)
        yield Picture("bars", "Does it work?", heights, draw, *_bars(evaluation))
    looks = [] if report is None else [(used, value) for used, value in report.curve if value is not None]
    if len(looks) > 1:
        yield Picture("curve", "How did the fit go?", (2.9,), partial(_draw_curve, looks), _CURVE)


def report_sheet(contents: Contents, form: theme.Format) -> bytes:
    """Draw the sheet, and return the content of its file. The same contents give the same bytes.

    Raises UsageError if there is no picture to draw, or matplotlib is not installed.
    """
    found = list(pictures(contents))
    if not found:
        raise UsageError(f"{contents.name}: has nothing to draw: write the page as html")
    verdict = headline(contents)
    lines = [visible(contents.name), f"{verdict.word}: {verdict.sentence}", *map(visible, verdict.reasons)]
    text = [part for line in lines for part in textwrap.wrap(line, _LETTERS)]
    tall = _LINE * (len(text) + 1) + sum(_TITLE + sum(picture.heights) for picture in found)
    with theme.drawing():
        sheet = theme.new_figure(tall)
        sheet.set_facecolor("white")
        sheet.text(0.02, 1 - _LINE / 2 / tall, "\n".join(text), va="top", fontsize=10, linespacing=1.3)
        top = tall - _LINE * (len(text) + 1)
        for picture in found:
            sheet.text(0.02, (top - _TITLE / 2) / tall, picture.title, va="center", fontsize=12, fontweight="bold")
            top -= _TITLE + sum(picture.heights)
            picture.draw([sheet.add_axes(place) for place in _places(picture, top, tall)])
        return theme.file_of(sheet, form)


def _bars(evaluation: Evaluation) -> tuple[str, Key]:
    what = "examples" if evaluation.written else "questions"
    words = f"Means over {evaluation.count:,} {what}. The thin line and the brackets are the 95% interval: where the "
    words += "mean would probably lie if other questions of this kind were asked; more questions make it shorter. Bars "
    words += "whose intervals hardly overlap do differ."
    parts = dict.fromkeys(model.part for model in evaluation.models)
    return words, tuple(("other" if part == "random" else part, _MEANINGS[part]) for part in parts)


def _places(picture: Picture, bottom: float, tall: float) -> list[tuple[float, float, float, float]]:
    """Return the panels' bounds as shares of a sheet of `tall` inches; the picture starts at `bottom` inches."""
    share, start = sum(picture.heights) / tall, bottom / tall
    bounds = [axes.get_position().bounds for axes in picture.figure().axes]
    return [(left, start + low * share, width, height * share) for left, low, width, height in bounds]


def _draw_bars(evaluation: Evaluation, panels: list[Axes]) -> None:
    """Draw a panel per figure: a bar per model, a whisker for its interval, and both as numbers."""
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
        words = f"{shown.title}\n{better} is better"
        axes.text(0.01, 1.05, words, transform=edge, va="bottom", linespacing=1.3).set_in_layout(False)


def _draw_curve(curve: Sequence[tuple[int, float]], panels: list[Axes]) -> None:
    """Draw the held-out divergence in nats over the fit, and mark where another pass begins."""
    (axes,), places, values = panels, range(len(curve)), [divergence for _, divergence in curve]
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
    axes.set_xticks(shown, list(map(str, shown)))
    axes.set_xlabel(f"measurement during the fit, which used {last:,} texts")
    axes.set_ylabel("difference (nats)")
    axes.tick_params(labelsize=9)
