"""How page and pictures look: the style sheet, and matplotlib without the user's settings.

The page is light or dark as the reader's system is, one column on a phone, and light in print. Pictures have its
colours, and are the same bytes each time.
"""

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

# Each colour stands for a variable of the page's style sheet, which has a value for light and one for dark. On a sheet,
# which is always light, it is what is drawn.
INK, MUTED, LINE = "#1d2430", "#5b6573", "#c9ced6"
BASE, MOVED, TRAINED, OTHER, LEFT = "#8a93a1", "#2f62c9", "#2f8a57", "#b9a3c9", "#cf7a16"
_NAMES = "ink", "muted", "line", "base", "moved", "trained", "other", "left"
_VARIABLES = dict(zip((INK, MUTED, LINE, BASE, MOVED, TRAINED, OTHER, LEFT), _NAMES, strict=True))
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
# What would tell when a file was made.
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
        # A letter that the font lacks; browsers have other fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_figure(height: float) -> Figure:
    """Make an empty figure of the width of a picture; call it within `drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an element of a page, in the colours of its style sheet; call it within `drawing`.

    `name` makes the identifiers differ from those of other pictures; `label` is read to those who do not see it.
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
    """Return a figure as the content of a file, without a date."""
    stream = io.BytesIO()
    figure.savefig(stream, format=form, metadata=_UNDATED[form], dpi=150)
    return stream.getvalue()


def settle(figure: Figure) -> None:
    """Lay out a figure for good, and round the places of its axes: the solver's last digits differ each time."""
    figure.set_layout_engine("constrained")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(part, 6) for part in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))


def numbered(count: int) -> range:
    """Choose which of so many things along an axis get their number, eight at most."""
    return range(0, count, next((step for step in _STEPS if count <= 8 * step), count))


STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --ink: #1d2430; --muted: #5b6573; --line: #c9ced6;
  --base: #8a93a1; --moved: #2f62c9; --trained: #2f8a57; --other: #b9a3c9; --left: #cf7a16;
  --good: #1b6e20; --mixed: #8a5200; --bad: #b3261e; --open: #3a5a9b; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e8ecf3; --muted: #a6b0bd;
  --line: #454d59; --base: #8b95a3; --moved: #7aa2f7; --trained: #6cc492; --other: #b79fcb; --left: #e9a04c;
  --good: #81c784; --mixed: #ffb74d; --bad: #f28b82; --open: #9db8f2; } }
@media print { :root { color-scheme: light; --page: #ffffff; --card: #ffffff; --ink: #000000; --muted: #444444;
  --line: #bbbbbb; --base: #8a93a1; --moved: #2f62c9; --trained: #2f8a57; --other: #b9a3c9; --left: #cf7a16;
  --good: #1b6e20; --mixed: #8a5200; --bad: #b3261e; --open: #3a5a9b; }
  section, .example { break-inside: avoid; } main { max-width: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .5rem; }
p, ul, dl { margin: .4rem 0; }
.muted, figcaption, dt { color: var(--muted); }
.verdict { border-left: .4rem solid var(--tone); background: var(--card); padding: .8rem 1rem; margin: 1rem 0; }
.verdict p { font-size: 1.1rem; }
.verdict b { color: var(--tone); }
.good { --tone: var(--good); } .mixed { --tone: var(--mixed); } .bad { --tone: var(--bad); }
.open { --tone: var(--open); }
.grid { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
section, .grid { margin: 1.8rem 0; min-width: 0; }
.grid section { margin: 0; }
figure { margin: 0; display: grid; gap: .5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); align-items: center; }
figure svg { width: 100%; max-width: 36rem; height: auto; display: block; }
svg text { font-family: inherit !important; }
figcaption { font-size: .9rem; }
figcaption > div { padding-left: 1.1em; text-indent: -1.1em; }
.key { text-indent: 0; display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .3em; }
.example { background: var(--card); padding: .7rem 1rem; margin: .8rem 0; }
.texts { display: grid; gap: .5rem 1.2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); }
.texts:first-child { margin-bottom: .5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 14rem; overflow-y: auto; }
li.text { max-height: none; overflow: visible; margin: .7rem 0; }
.mark { border: 1px solid; border-radius: .3rem; padding: 0 .4rem; font-size: .8rem; white-space: nowrap; }
.right { color: var(--good); } .cut { color: var(--mixed); }
pre, .wide { overflow-x: auto; } pre { background: var(--card); padding: .8rem; font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1rem; } dd { margin: 0;
  overflow-wrap: anywhere; }
@media print { .text { max-height: none; overflow: visible; } pre { white-space: pre-wrap; } }
"""
# A page that was made of texts of others loads nothing and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
