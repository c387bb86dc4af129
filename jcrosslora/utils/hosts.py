"""Align two bases with several processes, on one host or more, with JAX's runtime (`jax.distributed`).

All processes run the same program. Groups of modules are sharded over the `layers` axis of all devices
(`NamedSharding`). Each process reads and decomposes only the modules on its own devices; then the maps are gathered.
Weights are never one global array: the matrices that need float64 differ between processes, so in a global program all
would wait for the slowest at every step. This way they wait once for each group.

With one process, the functions here do no communication.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jcrosslora.errors import HostError, LostHostError, UsageError
from jcrosslora.utils.cost import check_devices
from jcrosslora.utils.digests import Digests

T = TypeVar("T")
_together: ContextVar[bool] = ContextVar("together", default=False)
_CLUSTER = "auto"
# Seconds for all processes to start, until a silent one counts as lost, and for all to end.
_START_TIMEOUT, _HEARTBEAT_TIMEOUT, _SHUTDOWN_TIMEOUT = 300, 100, 30
# Seconds that the first process waits before it ends, which ends all others, so that they can print their errors.
_GRACE = 2


def count() -> int:
    """Return the number of processes, this one included."""
    check_devices()
    return jax.process_count()


def is_first() -> bool:
    """Return whether this is the process that writes the adapter, its report, and the cache."""
    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """Run a block in all processes at once; an error in one of them raises an error in all.

    The others learn of an error at their next exchange, at the end of the block at the latest. Nested blocks have no
    effect. Raises HostError if another process failed or ended, and UsageError if the processes have different numbers
    of devices.
    """
    if count() == 1 or _together.get():
        yield
        return
    if jax.local_device_count() * count() != jax.device_count():
        own = f"process {jax.process_index()} has {jax.local_device_count()} of {jax.device_count()} devices"
        msg = f"{own}; give each of the {count()} processes the same number"
        raise UsageError(msg)
    token = _together.set(True)
    try:
        try:
            yield
        except HostError:
            raise  # the others know already
        except Exception as error:
            with suppress(HostError):
                _exchange({"failed": _one_line(error)})
            raise
        exchange("end", None)
    finally:
        _together.reset(token)


def exchange(what: str, value: Any) -> list[Any]:
    """Return the values of all processes, in their order. All of them have to call it, within `together`.

    `what` names the exchange, the same in all processes; `value` is a JSON value. Raises HostError if another process
    failed, ended, or is at another exchange.
    """
    if count() == 1:
        return [value]
    found = _exchange({"what": what, "value": value})
    for number, one in enumerate(found):
        if "failed" in one:
            msg = f"process {number} of {count()} failed, so this one ends too: {one['failed']}"
            raise HostError(msg)
    exchanges = list(dict.fromkeys(one["what"] for one in found))
    if len(exchanges) > 1:
        msg = f"the processes do different work ({', '.join(exchanges)}); start all of them with the same arguments"
        raise HostError(msg)
    return [one["value"] for one in found]


def from_first(what: str, work: Callable[[], T]) -> T:
    """Do work in the first process alone, and return its result, a JSON value, in all processes."""
    return exchange(what, work() if is_first() else None)[0]


def own_part(items: Sequence[T]) -> list[T]:
    """Return the items that this process takes, at least one; several processes may take the last item."""
    return [items[row] for row in _part(jax.process_index(), len(items))]


def gather(
    what: str, arrays: Mapping[str, np.ndarray], labels: Sequence[Sequence[Any]], items: int
) -> tuple[dict[str, np.ndarray], list[list[Any]]]:
    """Gather the parts of all processes, of `items` in all, at an exchange of this name.

    The arrays of a part have a first axis over the items of `own_part`, and its lists one JSON value for each. Raises
    HostError if another process failed or ended.
    """
    parts_of_all = exchange(what, [list(one) for one in labels])
    by_item: list[dict[int, Any]] = [{} for _ in labels]
    for process, parts in enumerate(parts_of_all):
        for values, part in zip(by_item, parts, strict=True):
            values.update(zip(_part(process, items), part, strict=True))
    rows = np.array(_rows(jax.process_index(), items))
    # Packed into one array, because CPU programs may start several exchanges in different orders.
    own = {name: np.ascontiguousarray(array[rows - rows[0]]) for name, array in arrays.items()}
    packed = np.concatenate([_bytes(array) for array in own.values()], axis=1)
    sharding = over_all_devices()
    with _reporting_losses():
        shape = (len(rows) * count(), packed.shape[1])
        full = jax.make_array_from_process_local_data(sharding, packed, shape)
        everywhere = jax.jit(lambda whole: whole, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
        packed = np.asarray(everywhere(full).addressable_data(0))[:items]
    shapes = {name: (array.dtype.name, (items, *array.shape[1:])) for name, array in own.items()}
    return _unpack(packed, shapes), [[values[item] for item in range(items)] for values in by_item]


def over_all_devices() -> NamedSharding:
    """Return the sharding of a first axis over the devices of all processes, grouped by process."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return NamedSharding(Mesh(np.array(devices), ("layers",)), PartitionSpec("layers"))


def send(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the first process's arrays, by name, in all processes; the arguments of the others are ignored.

    Raises HostError if another process failed or ended.
    """
    if count() == 1:
        return dict(arrays)
    shapes = from_first("shapes", lambda: {name: (array.dtype.name, array.shape) for name, array in arrays.items()})
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes.values())
    # As bytes, whose sum with the zeros of the others is exact; with floating point numbers, -0 would become 0.
    packed = np.zeros(size, np.uint8)
    if is_first():
        packed = np.concatenate([_bytes(np.ascontiguousarray(array)).reshape(-1) for array in arrays.values()])
    with _reporting_losses():
        packed = np.asarray(multihost_utils.broadcast_one_to_all(packed))
    return _unpack(packed[None], shapes)


def shared(digests: Digests | None) -> Digests | None:
    """Let the first process compute or remember digests of files for all, so that the others need not read them.

    All processes have to ask for them at once.
    """
    if count() == 1:
        return digests

    def by_first(paths: Sequence[Path], compute: Callable[[], list[str]]) -> list[str]:
        return from_first("digests", compute if digests is None else partial(digests, paths, compute))

    return by_first


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes; call it before any other use of JAX.

    JAX ends the process, with a message, if the others do not start or are lost later.

    Args:
        coordinator: HOST:PORT of process 0; "auto" if the cluster provides it (Slurm, Open MPI, Kubernetes, Cloud TPU,
            or `JAX_COORDINATOR_ADDRESS` with the two numbers); None for a process that works alone.
        processes: number of processes.
        process: number of this process, from 0.

    Raises UsageError if the arguments are invalid or incomplete, or the cluster does not provide them.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            msg = "processes and process were given without a coordinator; give HOST:PORT of process 0 too"
            raise UsageError(msg)
        return
    if coordinator != _CLUSTER:
        _check_arguments(coordinator, processes, process)
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


def _rows(process: int, items: int) -> list[int]:
    """Return the item of every row on the devices of a process; surplus rows repeat the last item."""
    each = -(-items // jax.device_count()) * jax.local_device_count()
    return [min(row, items - 1) for row in range(process * each, (process + 1) * each)]


def _part(process: int, items: int) -> list[int]:
    return list(dict.fromkeys(_rows(process, items)))


def _bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of every row, uint8 (L', n)."""
    return array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)


def _unpack(packed: np.ndarray, shapes: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """Split rows (L', n) of bytes into arrays of the given dtypes and shapes, in this order."""
    found, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        stop = start + math.prod(shape) * np.dtype(dtype).itemsize // len(packed)
        found[name] = np.ascontiguousarray(packed[:, start:stop]).view(dtype).reshape(shape)
        start = stop
    return found


def _exchange(message: Mapping[str, Any]) -> list[Any]:
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    with _reporting_losses():
        lengths = np.asarray(multihost_utils.process_allgather(np.array(text.size, np.int32)))
        # Padded to a power of two, to limit recompilation.
        padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)
        padded[: text.size] = text
        found = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:length].tobytes()) for row, length in zip(found, lengths, strict=True)]


@contextmanager
def _reporting_losses() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = _one_line(error)[:300]
        msg = f"another of the {count()} processes ended or cannot be reached; see their output ({reason})"
        raise LostHostError(msg) from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_arguments(coordinator: str, processes: int | None, process: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        msg = f"coordinator {coordinator!r} is not of the form HOST:PORT, such as 10.0.0.1:1234, nor {_CLUSTER!r}"
        raise UsageError(msg)
    if processes is None or process is None or not 0 <= process < processes:
        msg = f"process {process} of {processes} does not exist; give --processes N and --process I from 0 to N - 1"
        raise UsageError(msg)
