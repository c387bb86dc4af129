"""The errors that users can get: one base class, and messages of one line.

Every message says what the program got, what it expected, and what to do. The command line prints only the message and
exits with code 2; a traceback means a bug in this package.
"""

from collections.abc import Iterable

_LONGEST = 4000  # characters; real messages have a few hundred
# For those who knew the old names.
_RENAMED = {"probe_text": "prompts", "--probe-text": "--prompts", "--task": "--data"}


class JCrossLoRAError(Exception):
    """Base of every error that the package raises on purpose.

    Messages quote names from files, which may hold anything: what is shown is one line that does nothing to a terminal.
    """

    def __str__(self) -> str:
        message = super().__str__()
        message = message if len(message) <= _LONGEST else message[:_LONGEST] + "..."
        return message if message.isprintable() else "".join(map(_printable, message))


def _printable(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


class CheckpointError(JCrossLoRAError):
    """A base model cannot be read: missing, truncated, of an unknown family, or with weights that make no sense."""


class AdapterError(JCrossLoRAError):
    """An adapter cannot be read, is of a kind that is not supported, or does not fit its base model."""


class SourceError(JCrossLoRAError):
    """A source on a server cannot be reached, or its answers cannot be used."""


class PairingError(JCrossLoRAError):
    """The modules of two bases cannot be paired as requested."""


class MethodError(JCrossLoRAError):
    """A transfer method is unknown, or cannot be used on this pair of bases."""


class OutputError(JCrossLoRAError):
    """A result cannot be written: the place exists, cannot be written to, or is full."""


class CacheError(JCrossLoRAError):
    """A command on the cache found it damaged or not writable. Transfers go on without it."""


class ShortMemoryError(JCrossLoRAError):
    """The host or a device has too little memory for the request."""


class UsageError(JCrossLoRAError):
    """A setting has a value that makes no sense."""


class BatchError(JCrossLoRAError):
    """Some jobs of a batch failed; the others are done."""


def not_finite(
    base: str, adapter: str | None = None, *, values: str = "predictions", sound: bool = False
) -> CheckpointError | AdapterError:
    """Make the error of a base, alone or with an adapter, whose predictions or other values are not finite.

    Both are given by name. `sound` says that the base alone gives finite ones, so that it must be the adapter.
    """
    what = f"gives {values} that are not finite"
    if adapter is None:
        return CheckpointError(f"{base}: {what}: its weights are too large or not numbers")
    whose = "its factors" if sound else "its factors, or the base's weights,"
    return AdapterError(f"{adapter}: {what} on {base}: {whose} are too large or not numbers")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that a misspelt one is closest to: " (did you mean 'copy'?)", or "" if none is close."""
    import difflib

    close = difflib.get_close_matches(_RENAMED.get(name, name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
