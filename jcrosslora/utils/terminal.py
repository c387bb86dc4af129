"""A console for untrusted text: it escapes everything that would act on the terminal."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from jcrosslora.utils.texts import visible


class SafeConsole(Console):
    """A console that writes control characters out, and reads neither markup nor names of emoji in a text."""

    def __init__(self, **options: Any) -> None:
        """Take the options of `rich.console.Console`."""
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string, before its width is measured."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything; non-strings are escaped here."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(visible(part.text), part.style)


def say(console: Console, text: str, *, style: str | None = None) -> None:
    """Print one line unchanged: no markup, no wrapping, and nothing in it begins another line."""
    console.print(visible(text, keep="\t"), highlight=False, markup=False, emoji=False, soft_wrap=True, style=style)


def print_table(
    console: Console, columns: Iterable[str | Column], rows: Iterable[Iterable[Any]], title: str | None = None
) -> None:
    """Print a table; the cells show their texts unchanged, without markup."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    if console.measure(table).minimum > console.width:  # rather no lines than no ends of words
        table.box, table.padding = None, (0, 1, 0, 0)
    console.print(table, highlight=False, markup=False)
