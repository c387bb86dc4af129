"""How much memory there is, and one error for too little of it, on the host or on a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jcrosslora.errors import ShortMemoryError

_GROUP = Path("/sys/fs/cgroup")  # of a container, as it sees it
_STATUS = "RESOURCE_EXHAUSTED: "  # the prefix of XLA's message


@contextmanager
def enough_memory(advice: str = "") -> Iterator[None]:
    """Turn the memory errors of Python, NumPy and JAX into a `ShortMemoryError`; other errors pass.

    Args:
        advice: what to do to need less memory, for the message.

    Raises:
        ShortMemoryError: memory ran out in the block.
    """
    try:
        yield
    except MemoryError as error:
        raise _short(str(error), advice) from error
    except RuntimeError as error:
        import jax

        if not (isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(_STATUS)):
            raise
        raise _short(str(error).removeprefix(_STATUS), advice) from error


def _short(said: str, advice: str) -> ShortMemoryError:
    first = said.splitlines()[0].strip().rstrip(".") if said.strip() else ""
    ways = "use a device or a machine with more memory" + (f", or {advice}" if advice else "")
    return ShortMemoryError(f"not enough memory{f' ({first})' if first else ''}: {ways}")


def free_memory(count: int = 1) -> int | None:
    """Return how many bytes each of the first `count` devices can still hold; None where that cannot be found out.

    Those of a CPU share what the host can.
    """
    import jax

    devices = jax.local_devices()[:count]
    if devices[0].platform != "cpu":
        held = [device.memory_stats() or {} for device in devices]
        known = all({"bytes_limit", "bytes_in_use"} <= one.keys() for one in held)
        return min(one["bytes_limit"] - one["bytes_in_use"] for one in held) if known else None
    free = _free_of_host()
    return None if free is None else free // count


def _free_of_host() -> int | None:
    """Return how many bytes the host, or its container, has; None where that cannot be found out."""
    host = dict(line.split(":", 1) for line in _text(Path("/proc/meminfo")).splitlines() if ":" in line)
    found = [int(host["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in host else []
    most, used = (_text(_GROUP / f"memory.{name}").strip() for name in ("max", "current"))
    return min([*found, *([int(most) - int(used)] if most.isdigit() and used.isdigit() else [])], default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # not Linux, or no limit
        return ""
