"""The base of settings dataclasses: an unknown name raises an error that suggests the right one, in Python too."""

import inspect
from typing import TYPE_CHECKING, Any, Self

from jcrosslora.errors import UsageError, suggestion


class Settings:
    """Base of dataclasses whose fields are set by users.

    Raises UsageError if a setting is unknown, given twice, or missing.
    """

    # Type checkers, `inspect` and `help` see the `__init__` of the dataclass.
    if not TYPE_CHECKING:

        def __new__(cls, *values: Any, **given: Any) -> Self:
            """Check the names before `__init__` takes them."""
            if values or given:  # pickle and copy give none
                _check_call(cls, values, given)
            return super().__new__(cls)

    @classmethod
    def called(cls) -> str:
        """Return what errors call it."""
        return cls.__name__


def _check_call(cls: type[Settings], values: tuple[Any, ...], given: dict[str, Any]) -> None:
    signature = inspect.signature(cls)
    try:
        signature.bind(*values, **given)
    except TypeError as error:
        known = list(signature.parameters)
        has = f"its settings are {', '.join(known)}" if known else "it has no settings"
        if name := next((name for name in given if name not in known), None):
            msg = f"{cls.called()} has no setting {name}{suggestion(name, known)}; {has}"
            raise UsageError(msg) from None
        msg = f"{cls.called()}: {error}; {has}"
        raise UsageError(msg) from None
