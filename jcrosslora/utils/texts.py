"""Make untrusted text safe to show on a terminal, on one line, in HTML and in Markdown."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape

# Tokens, and the signature in the URL of an upload.
_SECRETS = (
    (re.compile(r"(?i)(bearer\s+)[^\s'\"]+"), r"\1***"),
    (re.compile(r"\bhf_\w{4,}"), "hf_***"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1"),
)

# Control characters, halves of a pair, line separators, and characters that reverse the text after them.
_ACTING = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # of a page with untrusted texts
_CODE = re.compile(r"`([^`\n]+)`")


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Write characters that act on a terminal, or on the text after them, as Python writes them.

    Characters in `keep` stay unchanged.
    """
    return text if text.isprintable() else "".join(one if one in keep else _shown(one) for one in text)


def _shown(one: str) -> str:
    acts = unicodedata.category(one) in _ACTING or unicodedata.bidirectional(one) in _TURNING
    return ascii(one)[1:-1] if acts else one


def shortened(text: str, most: int = 60) -> str:
    """Cut a text to a number of characters, with three dots at the end if it is longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safe_line(text: object, limit: int = 200) -> str:
    """Return the message of another program on one line, without tokens and signatures."""
    line = " ".join(str(text).split())
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line[:limit]


# Only alignment and a border of the text's own colour: the notebook's light or dark theme decides the rest.
_TABLE = "border-collapse:collapse;text-align:left"
_CAPTION = "caption-side:top;text-align:left;font-weight:bold;padding:2px 8px 4px 0"
_CELL = "text-align:left;padding:2px 12px 2px 0;border-bottom:1px solid rgba(128,128,128,0.35)"


def html_text(text: object) -> str:
    """Return an untrusted text as HTML that shows it."""
    return escape(visible(str(text)))


def html_page(title: str, style: str, body: Sequence[str]) -> str:
    """Return an HTML page with a title and parts, both escaped already. It loads nothing and runs nothing."""
    head = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>",
    ]
    return "\n".join([*head, *body, "</body>\n</html>\n"])


def html_prose(text: object) -> str:
    """Return an untrusted sentence as HTML; text in backticks is code."""
    parts = _CODE.split(str(text))
    return "".join(f"<code>{html_text(part)}</code>" if at % 2 else html_text(part) for at, part in enumerate(parts))


def html_table(rows: Sequence[Mapping[str, str]], caption: str = "") -> str:
    """Return an HTML table; every text in it is escaped.

    Args:
        rows: one mapping from column title to cell text for each row. The columns are those of all rows, in the order
            of their first use; a row without a column gets an empty cell. A column titled "" has an empty heading, and
            if all titles are "" there is no line of headings.
        caption: a line above the table, omitted if empty.
    """
    columns = list(dict.fromkeys(title for row in rows for title in row))
    lines = [_row("th", {title: title for title in columns})] if any(columns) else []
    lines += [_row("td", {title: row.get(title, "") for title in columns}) for row in rows]
    title = f'<caption style="{_CAPTION}">{html_text(caption)}</caption>' if caption else ""
    return f'<table style="{_TABLE}">{title}{"".join(lines)}</table>'


def _row(tag: str, cells: Mapping[str, str]) -> str:
    """Return a row. Each cell carries its column title, for pages that show it on narrow screens."""
    shown = (
        f'<{tag} style="{_CELL}" data-title="{html_text(title)}">{html_text(text)}</{tag}>'
        for title, text in cells.items()
    )
    return f"<tr>{''.join(shown)}</tr>"


# An underscore inside a word means nothing.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|^[#>]")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;"})


def markdown_text(text: object) -> str:
    """Return a text in one line, with all Markdown syntax escaped."""
    return _escaped(_line(text))


def markdown_prose(text: object) -> str:
    """Return a sentence in one line as Markdown; text in backticks stays code."""
    return "".join(f"`{part}`" if at % 2 else _escaped(part) for at, part in enumerate(_CODE.split(_line(text))))


def markdown_code(text: object) -> str:
    """Return a text in one line as Markdown code, without its backticks."""
    return f"`{_line(text).replace('`', '')}`"


def _escaped(line: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", line).translate(_HTML)


def _line(text: object) -> str:
    return visible(" ".join(str(text).split()))
