"""Start and end of a process that works with others: by their address, or as the cluster tells."""

import os
import sys
import time
from contextlib import suppress
from typing import NoReturn

import jax

from jcrosslora.errors import UsageError

CLUSTER = "auto"
# Seconds: for all processes to start, until one that gives no sign of life counts as lost, and for all to end.
_START, _SILENCE, _END = 300, 100, 30
# Seconds that the first process, whose end ends all others, leaves them to say what happened.
_LAST_WORDS = 2


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Work together with other processes from now on; to be called before JAX is used for anything else.

    JAX itself ends the process, with a message, if the others do not come or are lost later.

    Args:
        coordinator: HOST:PORT of process 0, "auto" where the cluster tells it (Slurm, Open MPI, Kubernetes, Cloud TPU,
            or `JAX_COORDINATOR_ADDRESS` with the two numbers), or None for a process that works alone.
        processes: how many there are.
        process: which of them this is, from 0.

    Raises:
        UsageError: these make no sense, or the cluster does not tell.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            msg = "processes and process were given without a coordinator; give HOST:PORT of process 0, too"
            raise UsageError(msg)
        return
    if coordinator != CLUSTER:
        _check(coordinator, processes, process)
        which = f"process {process} of {processes}, {coordinator}"
        print(f"jcrosslora: {which}: waiting up to {_START} s for all to start", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            None if coordinator == CLUSTER else coordinator,
            processes,
            process,
            initialization_timeout=_START,
            heartbeat_timeout_seconds=_SILENCE,
            shutdown_timeout_seconds=_END,
        )
    except (RuntimeError, ValueError) as error:
        msg = f"the processes cannot be joined ({error}); give --coordinator HOST:PORT --processes N --process I"
        raise UsageError(msg) from error


def leave(code: int) -> NoReturn:
    """End the process at once.

    An ordinary end would wait for fellows that may be lost; and in the middle of the work, as after Ctrl-C, it takes
    from XLA's threads what they still compute on, which makes some of them crash.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(_LAST_WORDS)
    os._exit(code)


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        msg = f"coordinator {coordinator!r} is not of the form HOST:PORT, such as 10.0.0.1:1234, and not {CLUSTER}"
        raise UsageError(msg)
    if processes is None or process is None or not 0 <= process < processes:
        msg = f"process {process} of {processes} does not exist; give --processes N and --process I from 0 to N - 1"
        raise UsageError(msg)
