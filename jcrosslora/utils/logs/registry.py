"""The logs by name. Each is a module with `start(name, settings)`, imported when it is asked for."""

from collections.abc import Callable
from importlib import import_module
from typing import Literal, TypeAlias, get_args

from jcrosslora.errors import UsageError, suggestion
from jcrosslora.utils.logs.log import Log, Settings
from jcrosslora.utils.texts import safe_line

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
