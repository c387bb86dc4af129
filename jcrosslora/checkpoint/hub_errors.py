"""Say why a request to the hub failed, in one line and without secrets."""

from typing import cast

from jcrosslora.utils.texts import safe_line


def failures() -> tuple[type[Exception], ...]:
    """Return the errors by which the hub's client says that a file cannot be had."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The parents of HfHubHTTPError are OSError and the HTTPError of the HTTP library, which differs between versions of
    # huggingface_hub; together they cover refused, offline and broken connections.
    return cast("tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, EntryNotFoundError, ValueError))


def cause_of(error: BaseException, limit: int = 200) -> str:
    """Return the kind of an error and its message, as `safe_line` shortens it."""
    return f"{type(error).__name__}: {safe_line(error, limit)}".removesuffix(": ")
