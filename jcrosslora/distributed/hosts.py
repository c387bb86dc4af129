"""Several processes, on one host or more, that align two bases together on JAX's own runtime (`jax.distributed`).

All of them run the same program. Of every group of modules each takes the rows that lie on its own devices of a
`NamedSharding` over the `layers` axis of all devices, reads and decomposes these alone, and then the maps are gathered.
Weights are never one global array: which matrices have to be redone in float64 differs from process to process, and as
one program all would wait for the slowest at every step; this way they wait once for each group.

With one process every function here does nothing, or what it says for that one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jcrosslora.checkpoint.base import Digests
from jcrosslora.errors import HostError, LostHostError, UsageError
from jcrosslora.linalg import over_all_devices

T = TypeVar("T")

_together: ContextVar[bool] = ContextVar("together", default=False)


def count() -> int:
    """How many processes take part, this one included."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that writes: the adapter, its report, and the cache."""
    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """A block that all processes run at once. An error in one of them ends it with an error in all.

    An error is told to the others when they exchange something next, at the end of the block at the latest. Blocks
    inside this one do nothing of their own.

    Raises:
        HostError: another process failed, or ended.
        UsageError: the processes have different numbers of devices.
    """
    if count() == 1 or _together.get():
        yield
        return
    if jax.local_device_count() * count() != jax.device_count():
        msg = (
            f"process {jax.process_index()} has {jax.local_device_count()} of {jax.device_count()} devices; give all "
            f"{count()} processes equally many"
        )
        raise UsageError(msg)
    token = _together.set(True)
    try:
        try:
            yield
        except HostError:
            raise  # the others know
        except Exception as error:
            with suppress(HostError):
                _exchange({"failed": _sentence(error)})
            raise
        exchange("end", None)
    finally:
        _together.reset(token)


def exchange(what: str, value: Any) -> list[Any]:
    """The values of all processes, in their order; to be called by all of them, within `together`.

    Args:
        what: says what is exchanged, the same in all processes.
        value: anything that JSON can hold.

    Raises:
        HostError: another process failed, ended, or is somewhere else in its work.
    """
    if count() == 1:
        return [value]
    found = _exchange({"what": what, "value": value})
    failed = [(number, one["failed"]) for number, one in enumerate(found) if "failed" in one]
    if failed:
        number, reason = failed[0]
        msg = f"process {number} of {count()} failed, and so this one ends too: {reason}"
        raise HostError(msg)
    met = list(dict.fromkeys(one["what"] for one in found))
    if len(met) > 1:
        msg = f"the processes are not at the same point of the same work ({', '.join(met)}); start all of them alike"
        raise HostError(msg)
    return [one["value"] for one in found]


def from_first(what: str, work: Callable[[], T]) -> T:
    """What the first process makes, in all of them; the others do no work. The value must be one that JSON can hold."""
    return exchange(what, work() if is_first() else None)[0]


def own_part(items: Sequence[T]) -> list[T]:
    """Those of some items, at least one, that this process takes; more than one process may take the last."""
    return [items[row] for row in _part(jax.process_index(), len(items))]


def gather(
    what: str, arrays: Mapping[str, np.ndarray], labels: Sequence[Sequence[Any]], items: int
) -> tuple[dict[str, np.ndarray], list[list[Any]]]:
    """Put the parts of all processes together.

    Args:
        what: says what is gathered, as for `exchange`.
        arrays: by name, with the leading axis that `own_part` of `items` items has.
        labels: lists of JSON values, one for each item of the part.
        items: how many there are in all.

    Returns:
        The arrays and the lists of all items.

    Raises:
        HostError: another process failed or ended.
    """
    stated = exchange(what, [list(one) for one in labels])
    known: list[dict[int, Any]] = [{} for _ in labels]
    for process, parts in enumerate(stated):
        for one, part in zip(known, parts, strict=True):
            one.update(zip(_part(process, items), part, strict=True))
    rows = np.array(_rows(jax.process_index(), items))
    # As one array: programs on a CPU do not begin several exchanges in the same order everywhere.
    own = {name: np.ascontiguousarray(array[rows - rows[0]]) for name, array in arrays.items()}
    packed = np.concatenate([_bytes(array) for array in own.values()], axis=1)
    sharding = over_all_devices()
    with _losses():
        shape = (len(rows) * count(), packed.shape[1])
        full = jax.make_array_from_process_local_data(sharding, packed, shape)
        everywhere = jax.jit(_same, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
        packed = np.asarray(everywhere(full).addressable_data(0))[:items]
    shapes = {name: (array.dtype.name, (items, *array.shape[1:])) for name, array in own.items()}
    return _unpacked(packed, shapes), [[one[row] for row in range(items)] for one in known]


def send(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first process's arrays, by name, in all processes; what the others give is not looked at.

    Raises:
        HostError: another process failed or ended.
    """
    if count() == 1:
        return dict(arrays)
    shapes = from_first("shapes", lambda: {name: (array.dtype.name, array.shape) for name, array in arrays.items()})
    size = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes.values())
    # As bytes: their sum with the others' zeros is exact, which that of floating point numbers (-0) is not.
    packed = np.zeros(size, np.uint8)
    if is_first():
        packed = np.concatenate([_bytes(np.ascontiguousarray(array)).reshape(-1) for array in arrays.values()])
    with _losses():
        packed = np.asarray(multihost_utils.broadcast_one_to_all(packed))
    return _unpacked(packed[None], shapes)


def shared(digests: Digests | None) -> Digests | None:
    """Digests of files that the first process makes, or remembers, for all: the others need not read the files."""
    return digests if count() == 1 else _FirstDigests(digests)


class _FirstDigests:
    def __init__(self, inner: Digests | None) -> None:
        self._inner = inner

    def sha256s(self, paths: Sequence[Path], compute: Callable[[], list[str]]) -> list[str]:
        """As `Digests` has it; to be called by all processes at once."""
        inner = self._inner
        return from_first("digests", compute if inner is None else lambda: inner.sha256s(paths, compute))


def _rows(process: int, items: int) -> list[int]:
    """The item of every row that lies on a device of a process; surplus rows repeat the last item."""
    each = -(-items // jax.device_count()) * jax.local_device_count()
    return [min(row, items - 1) for row in range(process * each, (process + 1) * each)]


def _part(process: int, items: int) -> list[int]:
    return list(dict.fromkeys(_rows(process, items)))


def _same(whole: jax.Array) -> jax.Array:
    return whole


def _bytes(array: np.ndarray) -> np.ndarray:
    """(L', n) uint8: the bytes of every row."""
    return array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)


def _unpacked(packed: np.ndarray, shapes: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, np.ndarray]:
    """Arrays by dtype and shape from rows (L', n) of bytes that hold a part of each, in this order."""
    found, start = {}, 0
    for name, (dtype, shape) in shapes.items():
        stop = start + math.prod(shape) * np.dtype(dtype).itemsize // len(packed)
        found[name] = np.ascontiguousarray(packed[:, start:stop]).view(dtype).reshape(shape)
        start = stop
    return found


def _exchange(message: Mapping[str, Any]) -> list[Any]:
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    with _losses():
        lengths = np.asarray(multihost_utils.process_allgather(np.array(text.size, np.int32)))
        # A power of two, so that few programs are compiled.
        padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)
        padded[: text.size] = text
        found = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:length].tobytes()) for row, length in zip(found, lengths, strict=True)]


@contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        msg = (
            f"another of the {count()} processes ended or cannot be reached; look at what they printed "
            f"({_sentence(error)[:300]})"
        )
        raise LostHostError(msg) from error


def _sentence(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
