"""Say why a request to the hub failed, in one line and without secrets."""

import re
from typing import cast

# Tokens, and what stands behind the address of an upload, which is signed.
_SECRETS = (
    (re.compile(r"(?i)(bearer\s+)[^\s'\"]+"), r"\1***"),
    (re.compile(r"\bhf_\w{4,}"), "hf_***"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1"),
)


def failures() -> tuple[type[Exception], ...]:
    """Return the errors by which the hub's client says that a file cannot be had."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The parents of HfHubHTTPError are OSError and the HTTPError of the HTTP library, which differs between versions of
    # huggingface_hub; together they cover refused, offline and broken connections.
    return cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, EntryNotFoundError, ValueError))


def one_line(text: object, limit: int = 200) -> str:
    """Return a text of the hub or its client on one line, without tokens and signatures.

    Args:
        text: a message, or an error.
        limit: the most characters.
    """
    line = " ".join(str(text).split())
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line[:limit]


def cause_of(error: BaseException, limit: int = 200) -> str:
    """Return the kind of an error and its message, as `one_line` shortens it."""
    return f"{type(error).__name__}: {one_line(error, limit)}".removesuffix(": ")
