"""The log that figures go to while a block runs, so that what computes them need not know of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from jcrosslora.utils.logs.log import Log, Settings
from jcrosslora.utils.logs.registry import LogName, find_log
from jcrosslora.utils.texts import safe_line

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

    Args:
        values: numbers by name; those that are not finite are left out.
        step: of the work; None takes that of the call before.
    """
    run = _ACTIVE.get()
    if run is not None:
        run.record(values, step)
