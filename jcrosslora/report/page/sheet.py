"""The verdict and the pictures as one sheet in SVG, PDF or PNG, for a paper or a slide; always light."""

from __future__ import annotations

import textwrap

from jcrosslora.errors import UsageError
from jcrosslora.evaluate.answers_table import visible
from jcrosslora.report.page.contents import Contents
from jcrosslora.report.page.headline import headline
from jcrosslora.report.page.pictures import pictures
from jcrosslora.report.page.theme import Format, drawing, file_of, new_figure

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
    heights = [_LINE * len(text), *(_TITLE + sum(picture.heights) for picture in found)]
    with drawing():
        figure = new_figure(sum(heights))
        figure.set_facecolor("white")
        parts = figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0]
        parts[0].text(0.02, 0.98, "\n".join(text), va="top", fontsize=10, linespacing=1.3)
        for part, picture in zip(parts[1:], found, strict=True):
            part.suptitle(picture.title, x=0.02, ha="left", fontweight="bold")
            grid = {"height_ratios": picture.heights}
            panels = part.subplots(len(picture.heights), squeeze=False, gridspec_kw=grid)
            picture.draw(list(panels[:, 0]))
        return file_of(figure, form)
