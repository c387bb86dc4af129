"""Texts of a bounded length."""

import re

# Tokens, and what stands behind the address of an upload, which is signed.
_SECRETS = (
    (re.compile(r"(?i)(bearer\s+)[^\s'\"]+"), r"\1***"),
    (re.compile(r"\bhf_\w{4,}"), "hf_***"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1"),
)


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
