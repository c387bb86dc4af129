"""Join several processes by address or by the cluster's settings, and leave them."""

import os
import sys
import time
from contextlib import suppress
from typing import NoReturn

import jax

from jcrosslora.errors import UsageError

_CLUSTER = "auto"
# Seconds for all processes to start, until a silent one counts as lost, and for all to end.
_START_TIMEOUT, _HEARTBEAT_TIMEOUT, _SHUTDOWN_TIMEOUT = 300, 100, 30
# Seconds that the first process waits before it ends, which ends all others, so that they can print their errors.
_GRACE = 2


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes; call it before any other use of JAX.

    JAX ends the process, with a message, if the others do not start or are lost later.

    Args:
        coordinator: HOST:PORT of process 0; "auto" if the cluster provides it (Slurm, Open MPI, Kubernetes, Cloud TPU,
            or `JAX_COORDINATOR_ADDRESS` with the two numbers); None for a process that works alone.
        processes: number of processes.
        process: number of this process, from 0.

    Raises:
        UsageError: the arguments are invalid or incomplete, or the cluster does not provide them.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            msg = "processes and process were given without a coordinator; give HOST:PORT of process 0 too"
            raise UsageError(msg)
        return
    if coordinator != _CLUSTER:
        _check(coordinator, processes, process)
        which = f"process {process} of {processes}, {coordinator}"
        print(f"jcrosslora: {which}: waiting up to {_START_TIMEOUT} s for all to start", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(
            None if coordinator == _CLUSTER else coordinator,
            processes,
            process,
            initialization_timeout=_START_TIMEOUT,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        msg = f"the processes cannot be joined ({error}); give --coordinator HOST:PORT --processes N --process I"
        raise UsageError(msg) from error


def leave(code: int) -> NoReturn:
    """End the process at once.

    An ordinary end would wait for processes that may be lost. In the middle of the work, as after Ctrl-C, it would also
    free memory that XLA's threads still use, which crashes some of them.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(_GRACE)
    os._exit(code)


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        msg = f"coordinator {coordinator!r} is not of the form HOST:PORT, such as 10.0.0.1:1234, nor {_CLUSTER!r}"
        raise UsageError(msg)
    if processes is None or process is None or not 0 <= process < processes:
        msg = f"process {process} of {processes} does not exist; give --processes N and --process I from 0 to N - 1"
        raise UsageError(msg)
