"""Texts and tables as plain inline HTML."""

from collections.abc import Mapping, Sequence
from html import escape

from jcrosslora.utils.texts import visible

# Only alignment and a border of the text's own colour: the notebook's light or dark theme decides the rest.
_TABLE = "border-collapse:collapse;text-align:left"
_CAPTION = "caption-side:top;text-align:left;font-weight:bold;padding:2px 8px 4px 0"
_CELL = "text-align:left;padding:2px 12px 2px 0;border-bottom:1px solid rgba(128,128,128,0.35)"


def html_text(text: object) -> str:
    """Return a text of anybody's as HTML that shows it."""
    return escape(visible(str(text)))


def html_table(rows: Sequence[Mapping[str, str]], caption: str = "") -> str:
    """Return an HTML table; every text in it is escaped.

    Args:
        rows: one mapping from column title to cell text for each row. The columns are those of all rows, in the order
            of their first use; a row without a column gets an empty cell. A column titled "" has an empty heading, and
            where all titles are "" there is no line of headings.
        caption: a line above the table, omitted if empty.
    """
    columns = list(dict.fromkeys(title for row in rows for title in row))
    lines = [_line("th", columns)] if any(columns) else []
    lines += [_line("td", [row.get(title, "") for title in columns]) for row in rows]
    title = f'<caption style="{_CAPTION}">{html_text(caption)}</caption>' if caption else ""
    return f'<table style="{_TABLE}">{title}{"".join(lines)}</table>'


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="{_CELL}">{html_text(cell)}</{tag}>' for cell in cells) + "</tr>"
