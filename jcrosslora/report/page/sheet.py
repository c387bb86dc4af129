"""The verdict and the pictures as one sheet in SVG, PDF or PNG, for a paper or a slide; always light."""

from __future__ import annotations

import textwrap

from jcrosslora.errors import UsageError
from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.headline import headline
from jcrosslora.report.page.pictures import Picture, pictures
from jcrosslora.report.page.theme import Format, drawing, file_of, new_figure
from jcrosslora.utils.texts import visible

_LETTERS = 70  # in a line
_LINE = 0.2  # inches
_TITLE = 0.35


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
