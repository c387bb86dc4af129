"""Texts of a bounded length, and texts that are shown."""

import re
import unicodedata

# Tokens, and what stands behind the address of an upload, which is signed.
_SECRETS = (
    (re.compile(r"(?i)(bearer\s+)[^\s'\"]+"), r"\1***"),
    (re.compile(r"\bhf_\w{4,}"), "hf_***"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1"),
)

# Control characters, halves of a pair, and separators of lines; and what turns the text behind it around.
_ACTING = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def visible(text: str, *, keep: str = "\n\t") -> str:
    """Write characters that act on a terminal, or on the text behind them, as Python writes them.

    Args:
        text: any.
        keep: characters that stay as they are.
    """
    return text if text.isprintable() else "".join(one if one in keep else _shown(one) for one in text)


def _shown(one: str) -> str:
    acts = unicodedata.category(one) in _ACTING or unicodedata.bidirectional(one) in _TURNING
    return ascii(one)[1:-1] if acts else one


def shortened(text: str, most: int = 60) -> str:
    """Return a text of at most so many characters; of a longer one the beginning, and three dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def safe_line(text: object, limit: int = 200) -> str:
    """Return what another program says on one line, without tokens and signatures.

    Args:
        text: a message, or an error.
        limit: the most characters.
    """
    line = " ".join(str(text).split())
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line[:limit]
