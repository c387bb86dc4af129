"""The style of the pictures: the page's colours, no user settings of matplotlib, and reproducible bytes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from jcrosslora.errors import UsageError
from jcrosslora.utils.texts import html_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each colour stands for a variable of `data/report.css`, which has a light and a dark value. A sheet is always light,
# and is drawn in these colours.
INK, MUTED, LINE = "#1d2430", "#5b6573", "#c9ced6"
BASE, MOVED, TRAINED, OTHER = "#8a93a1", "#2f62c9", "#2f8a57", "#b9a3c9"
_NAMES = "ink", "muted", "line", "base", "moved", "trained", "other"
_VARIABLES = dict(zip((INK, MUTED, LINE, BASE, MOVED, TRAINED, OTHER), _NAMES, strict=True))
_SETTINGS: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a $
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "jcrosslora",
}
WIDTH = 5.2  # inches of a picture
_STEPS = 1, 2, 5, 10, 20, 50, 100, 200
Format = Literal["svg", "pdf", "png"]
# Metadata to leave out, so that the same contents give the same bytes.
_UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with the page's settings while the block runs; raise UsageError if matplotlib is not installed."""
    try:
        from matplotlib import style
    except ImportError as error:
        msg = f"the pictures of a report need matplotlib ({error}): pip install 'jcrosslora[plot]'"
        raise UsageError(msg) from error
    with style.context(["default", _SETTINGS]), warnings.catch_warnings():
        # The font lacks some letters; browsers have other fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_figure(height: float) -> Figure:
    """Make an empty figure of the width of a picture; call it within `drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an SVG element in the colours of the page's style sheet; call it within `drawing`.

    `name` is a prefix that makes identifiers unique on the page; screen readers read `label`.
    """
    text = file_of(figure, "svg").decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    body = text[text.index(">") + 1 :]
    body = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\1{name}-", body).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{html_text(label)}">{body.strip()}'


def file_of(figure: Figure, form: Format) -> bytes:
    """Return the bytes of a figure as a file, without a date."""
    stream = io.BytesIO()
    figure.savefig(stream, format=form, metadata=_UNDATED[form], dpi=150)
    return stream.getvalue()


def settle(figure: Figure) -> None:
    """Fix the layout of a figure, and round the positions of its axes: the solver's last digits vary between runs."""
    figure.set_layout_engine("constrained")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(part, 6) for part in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))


def numbered(count: int) -> range:
    """Return which of `count` ticks of an axis get a number, at most eight."""
    return range(0, count, next((step for step in _STEPS if count <= 8 * step), count))
