"""Send the figures of a run to a log as it runs: Weights & Biases, Trackio, TensorBoard, or the user's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, Literal, Protocol, TypeAlias, get_args

from jcrosslora.errors import UsageError, suggestion
from jcrosslora.utils.texts import safe_line

__all__ = ["Log", "LogName", "find_log", "log_to", "record"]


# Settings of a run by their names, plain values without folders of this machine.
Settings: TypeAlias = Mapping[str, Any]


class Log(Protocol):
    """A run in a log, to which figures are added."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures.

        The step is never below that of the call before; all values are finite.
        """
        ...

    def finish(self, *, failed: bool) -> None:
        """End the run; called once."""
        ...


# The name of a log is that of its package and of the extra that installs it.
LogName: TypeAlias = Literal["wandb", "trackio", "tensorboard"]


def find_log(name: str) -> Callable[[str, Settings], Log]:
    """Return the function that begins a run in a log; nothing is begun.

    Raises:
        UsageError: no such log, or its package is not installed; from the function, that a run cannot begin.
    """
    known = get_args(LogName)
    if name not in known:
        msg = f"log {name!r} is unknown{suggestion(name, known)}; use one of {', '.join(known)}"
        raise UsageError(msg)
    try:
        module = import_module(f"jcrosslora.utils.logs.to_{name}")
    except ImportError as error:
        msg = f"log {name!r} needs the package {name} ({error}): pip install 'jcrosslora[{name}]'"
        raise UsageError(msg) from error

    def start(run: str, settings: Settings) -> Log:
        try:
            return module.start(run, settings)
        except Exception as error:
            msg = f"log {name!r} cannot begin a run ({safe_line(error, 300)}): mend that, or leave the "
            raise UsageError(msg + "log out") from error

    return start


_MESSAGES = logging.getLogger(__name__)


class _Run:
    """A log in use. A fault of it does not end the work: the log is left, and a warning says so."""

    def __init__(self, log: Log) -> None:
        self._log: Log | None = log
        self._step = 0

    def record(self, values: Mapping[str, float], step: int | None) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._step = max(self._step, step or 0)
        if self._log is not None and finite:
            try:
                self._log.log(self._step, finite)
            except Exception as error:
                self._leave(error)

    def finish(self, *, failed: bool) -> None:
        if self._log is not None:
            try:
                self._log.finish(failed=failed)
            except Exception as error:
                self._leave(error)

    def _leave(self, error: Exception) -> None:
        self._log = None
        _MESSAGES.warning("the log has a fault (%s); the work goes on without it", safe_line(error, 300))


_ACTIVE: ContextVar[_Run | None] = ContextVar("log", default=None)


@contextmanager
def log_to(log: Log | LogName | None, name: str = "run", settings: Settings | None = None) -> Iterator[None]:
    """Send the figures of transfers and trainings to a log while the block runs.

        with jcl.log_to("wandb", "my-move"):
            jcl.transfer(adapter, source, target)

    A fit gives the divergence on held-out completions, a training its loss, a transfer in the end what its maps kept
    and what its effect is. A fault of the log later on does not end the work.

    Args:
        log: "wandb", "trackio" or "tensorboard", each of which is an extra of this package and is set by its own
            environment variables; or an object with `log(step, values)` and `finish(failed=...)`. None sends nothing.
        name: of the run, for a log given by name.
        settings: shown beside the run, for a log given by name.

    Raises:
        UsageError: no such log, its package is not installed, or it cannot begin a run.
    """
    if log is None:
        yield
        return
    run = _Run(find_log(log)(name, settings or {}) if isinstance(log, str) else log)
    token, failed = _ACTIVE.set(run), True
    try:
        yield
        failed = False
    finally:
        _ACTIVE.reset(token)
        run.finish(failed=failed)


def record(values: Mapping[str, float], step: int | None = None) -> None:
    """Add figures to the log in use; without one nothing happens.

    Numbers that are not finite are left out; without a step that of the call before counts.
    """
    run = _ACTIVE.get()
    if run is not None:
        run.record(values, step)
