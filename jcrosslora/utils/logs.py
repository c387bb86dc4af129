"""Log the figures of a running job to Weights & Biases, Trackio, TensorBoard, or the user's own object.

Each log has environment variables for where a run goes: WANDB_MODE=offline, WANDB_PROJECT, WANDB_DIR; TRACKIO_DIR for
this machine, or TRACKIO_SPACE_ID; TENSORBOARD_LOGGING_DIR instead of `runs/`.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

from jcrosslora.errors import UsageError, suggestion
from jcrosslora.utils.texts import safe_line

# Settings of a run by name: plain values without local folders.
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
    """Return the function that begins a run in a log, without calling it.

    Raises UsageError if there is no such log, or its package is not installed. The function raises it if a run cannot
    begin.
    """
    known = get_args(LogName)
    if name not in known:
        raise UsageError(f"log {name!r} is unknown{suggestion(name, known)}; use one of {', '.join(known)}")
    package, begin = _LOGS[name]
    try:
        import_module(package)
    except ImportError as error:
        msg = f"log {name!r} needs the package {name} ({error}): pip install 'jcrosslora[{name}]'"
        raise UsageError(msg) from error

    def start(run: str, settings: Settings) -> Log:
        try:
            return begin(run, settings)
        except Exception as error:
            msg = f"log {name!r} cannot begin a run ({safe_line(error, 300)}): mend that, or leave the "
            raise UsageError(msg + "log out") from error

    return start


_MESSAGES = logging.getLogger(__name__)


class _Run:
    """A log in use. If it fails, the work goes on without it, after a warning."""

    def __init__(self, log: Log) -> None:
        self._log: Log | None = log
        self._step = 0

    def record(self, values: Mapping[str, float], step: int | None) -> None:
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._step = max(self._step, step or 0)
        if finite:
            self._tell(lambda log: log.log(self._step, finite))

    def finish(self, *, failed: bool) -> None:
        self._tell(lambda log: log.finish(failed=failed))

    def _tell(self, call: Callable[[Log], None]) -> None:
        try:
            if self._log is not None:
                call(self._log)
        except Exception as error:
            self._log = None
            _MESSAGES.warning("the log has a fault (%s); the work goes on without it", safe_line(error, 300))


_ACTIVE: ContextVar[_Run | None] = ContextVar("log", default=None)


@contextmanager
def log_to(log: Log | LogName | None, name: str = "run", settings: Settings | None = None) -> Iterator[None]:
    """Send the figures of transfers and trainings to a log while the block runs.

        with jcl.log_to("wandb", "my-move"):
            jcl.transfer(adapter, source, target)

    A fit logs the divergence on held-out completions, a training its loss, and a transfer at the end what its maps kept
    and its effect. If the log fails later on, the work continues.

    Args:
        log: "wandb", "trackio" or "tensorboard", each an extra of this package, configured by its own environment
            variables; or an object with `log(step, values)` and `finish(failed=...)`. None sends nothing.
        name: of the run, for a log given by name.
        settings: shown with the run, for a log given by name.

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
    """Add figures to the log in use, if any.

    Numbers that are not finite are left out; without a step, the previous one is used.
    """
    run = _ACTIVE.get()
    if run is not None:
        run.record(values, step)


# Settings that keep wandb from recording the machine and the working folder.
_UNTOLD: dict[str, Any] = {
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
    "console": "off",
    "host": "",
}


class WandbLog:
    """A run of Weights & Biases, which may ask the user to log in."""

    def __init__(self, name: str, settings: Settings) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "jcrosslora")
        self._run = wandb.init(project=project, name=name, config=dict(settings), settings=wandb.Settings(**_UNTOLD))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        """Send the remaining figures."""
        self._run.finish(exit_code=int(failed))


class TrackioLog:
    """A run of Trackio. Its output goes to standard error, as standard output belongs to the command."""

    def __init__(self, name: str, settings: Settings) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", "jcrosslora"),
                name=name,
                config=dict(settings),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures."""
        self._run.log(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:  # noqa: ARG002  # Trackio keeps no outcome of a run.
        """Write the remaining figures."""
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()


class TensorBoardLog:
    """An event file in a new folder, numbered if the name is taken.

    TensorBoard's own writer would put the host name into the file name.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        event, summary, tensors, types = (
            import_module(f"tensorboard.compat.proto.{one}_pb2") for one in ("event", "summary", "tensor", "types")
        )
        self._event, self._summary = event.Event, summary.Summary
        folder = _free(Path(os.environ.get("TENSORBOARD_LOGGING_DIR", "runs")), name)
        self._path, self._empty = folder / f"events.out.tfevents.{time.time():.0f}.jcrosslora", True
        self._writer = RecordWriter(self._path.open("wb"))
        self._add(file_version="brain.Event:2")
        text = "\n".join(f"    {line}" for line in json.dumps(dict(settings), indent=2, default=str).splitlines())
        kind = summary.SummaryMetadata
        tensor = tensors.TensorProto(dtype=types.DT_STRING, string_val=[text.encode()])
        metadata = kind(plugin_data=kind.PluginData(plugin_name="text"))
        self._add_values(0, [{"tag": "settings", "metadata": metadata, "tensor": tensor}])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add figures."""
        self._add_values(step, [{"tag": name, "simple_value": value} for name, value in values.items()])
        self._empty = False

    def finish(self, *, failed: bool) -> None:
        """Close the file; remove it if the work failed before its first figure, as on bad input."""
        self._writer.close()
        if failed and self._empty:
            self._path.unlink()
            self._path.parent.rmdir()

    def _add_values(self, step: int, values: Sequence[Mapping[str, Any]]) -> None:
        self._add(step=step, summary=self._summary(value=[self._summary.Value(**value) for value in values]))

    def _add(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()


def _free(folder: Path, name: str) -> Path:
    """Make a folder of this name, with the first free number after it if the name is taken."""
    number, made = 1, folder / name
    while True:
        try:
            made.mkdir(parents=True)
        except FileExistsError:
            number += 1
            made = folder / f"{name}-{number}"
        else:
            return made


# Name of a log -> the module that it needs, and the function that begins a run.
_LOGS: dict[str, tuple[str, Callable[[str, Settings], Log]]] = {
    "wandb": ("wandb", WandbLog),
    "trackio": ("trackio", TrackioLog),
    "tensorboard": ("tensorboard.summary.writer.record_writer", TensorBoardLog),
}
