"""Count the cost of work in texts, tokens and matrices; check the available devices and memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.errors import ShortMemoryError, UsageError

TEXT = 64  # tokens of a text whose length is not known beforehand
_GROUP = Path("/sys/fs/cgroup")  # of a container, as it sees it
_STATUS = "RESOURCE_EXHAUSTED: "  # the prefix of XLA's message


@dataclass(frozen=True)
class Cost:
    """Counts of the work that takes time; the costs of consecutive work are added.

    Attributes:
        texts: generated texts, as progress bars count them.
        written: decoding steps of the source, each for a whole batch of texts.
        source: tokens that the source reads.
        target: tokens that the target reads.
        predicted: tokens of the source and of the target whose logits are computed.
        stepped: tokens in gradient steps of the target.
        decomposed: matrices with a truncated SVD: shape, rank, and whether single vectors matter.
        svd: sum of O I min(O, I) over the matrices with a full SVD.
        precise: whether texts are read in float32.
        budget: least seconds that this work and the work before it take.
    """

    texts: int = 0
    written: float = 0.0
    source: float = 0.0
    target: float = 0.0
    predicted: tuple[float, float] = (0.0, 0.0)
    stepped: float = 0.0
    decomposed: tuple[tuple[tuple[int, int], int, bool], ...] = ()
    svd: float = 0.0
    precise: bool = False
    budget: float | None = None

    def __add__(self, other: "Cost") -> "Cost":
        """Add the counts; the budget belongs to one piece of work and is dropped."""
        return Cost(
            self.texts + other.texts,
            self.written + other.written,
            self.source + other.source,
            self.target + other.target,
            (self.predicted[0] + other.predicted[0], self.predicted[1] + other.predicted[1]),
            self.stepped + other.stepped,
            self.decomposed + other.decomposed,
            self.svd + other.svd,
            self.precise or other.precise,
        )

    @property
    def runs_bases(self) -> bool:
        """Whether a base runs, so that its programs have to be compiled."""
        return bool(self.written or self.source or self.target or self.stepped)


@contextmanager
def enough_memory(advice: str = "") -> Iterator[None]:
    """Turn the memory errors of Python, NumPy and JAX into a `ShortMemoryError`; other errors pass.

    `advice` says what to do to need less memory. Where JAX has no device, the error is that of `check_devices`.
    """
    try:
        yield
    except MemoryError as error:
        raise _short(str(error), advice) from error
    except (AssertionError, RuntimeError) as error:
        import jax

        check_devices()
        if not (isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith(_STATUS)):
            raise
        raise _short(str(error).removeprefix(_STATUS), advice) from error


def check_devices() -> None:
    """Raise UsageError if JAX cannot use the platform that is set; its own error is unclear."""
    import jax

    try:
        jax.local_devices()
    except (AssertionError, RuntimeError) as error:
        wanted = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms  # type: ignore[attr-defined]
        msg = f"JAX_PLATFORMS={wanted}: JAX finds no such device, or has no support for it (cpu is there): leave "
        raise UsageError(msg + "JAX_PLATFORMS out, or install JAX with support for it") from error


def free_memory(count: int = 1) -> int | None:
    """Return the free bytes of each of the first `count` devices; None if unknown.

    CPU devices share the free memory of the host.
    """
    import jax

    devices = jax.local_devices()[:count]
    if devices[0].platform != "cpu":
        held = [device.memory_stats() or {} for device in devices]
        known = all({"bytes_limit", "bytes_in_use"} <= one.keys() for one in held)
        return min(one["bytes_limit"] - one["bytes_in_use"] for one in held) if known else None
    free = _free_of_host()
    return None if free is None else free // count


def check_host(needed: int, of: str) -> None:
    """Raise MemoryError if the host is known to have fewer free bytes than needed; `of` names what takes them."""
    free = _free_of_host()
    if free is not None and needed > free:
        raise MemoryError(f"{of} take {needed / 1e9:.2f} GB of the host's memory, where {free / 1e9:.2f} GB are free")


def _short(said: str, advice: str) -> ShortMemoryError:
    first = said.splitlines()[0].strip().rstrip(".") if said.strip() else ""
    ways = "use a device or a machine with more memory" + (f", or {advice}" if advice else "")
    return ShortMemoryError(f"not enough memory{f' ({first})' if first else ''}: {ways}")


def _free_of_host() -> int | None:
    """Return the free bytes of memory of the host or its container, whichever is less; None if unknown."""
    host = dict(line.split(":", 1) for line in _read_text(Path("/proc/meminfo")).splitlines() if ":" in line)
    found = [int(host["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in host else []
    most, used = (_read_text(_GROUP / f"memory.{name}").strip() for name in ("max", "current"))
    if most.isdigit() and used.isdigit():
        stat = dict(line.split() for line in _read_text(_GROUP / "memory.stat").splitlines())
        cached = int(stat.get("inactive_file", 0))  # file pages, which are freed when memory is needed
        found.append(int(most) - max(0, int(used) - cached))
    return min(found, default=None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:  # not Linux, or no limit
        return ""
