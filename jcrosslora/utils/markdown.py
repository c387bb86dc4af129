"""Texts of others in Markdown: what they hold is shown, and makes neither HTML, images, links nor tables."""

import re

from jcrosslora.utils.texts import visible

# An underscore inside a word means nothing.
_SPECIAL = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)|^[#>]")
_HTML = str.maketrans({"&": "&amp;", "<": "&lt;"})


def markdown_text(text: object) -> str:
    """Return a text in one line, with all that Markdown would read in it escaped."""
    return _SPECIAL.sub(r"\\\g<0>", _line(text)).translate(_HTML)


def markdown_code(text: object) -> str:
    """Return a text in one line as code, which nothing in it can end."""
    return f"`{_line(text).replace('`', '')}`"


def _line(text: object) -> str:
    return visible(" ".join(str(text).split()))
