"""The interface of a log."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

# Settings of a run by their names, plain values without folders of this machine.
Settings: TypeAlias = Mapping[str, Any]


class Log(Protocol):
    """A run in a log, to which figures are added."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures.

        Args:
            step: of the work, never below that of the call before.
            values: finite numbers by name.
        """
        ...

    def finish(self, *, failed: bool) -> None:
        """End the run; called once.

        Args:
            failed: whether the work was ended by an error.
        """
        ...
