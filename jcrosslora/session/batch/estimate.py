"""What a batch would do, and what it would take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from jcrosslora.errors import JCrossLoRAError, MethodError, PairingError
from jcrosslora.session.batch.plan import BatchPlan, Unit, share_of, units_of
from jcrosslora.session.batch.run import CHUNK_BYTES
from jcrosslora.session.estimate import Estimate
from jcrosslora.session.transfer import estimate_pair
from jcrosslora.session.settings import flat_method
from jcrosslora.session.timing import Stopwatch

_CHUNKS = 2 * CHUNK_BYTES  # bytes of a chunk of adapters before and after


@dataclass(frozen=True)
class UnitEstimate:
    """What the jobs of a unit take, if their adapters have all modules; those with fewer take less.

    Attributes:
        found: the estimate of one adapter, or why the jobs cannot be done.
    """

    unit: Unit
    found: Estimate | str

    def record(self) -> dict[str, Any]:
        """Return the figures as a JSON value."""
        settings, jobs = self.unit.settings, len(self.unit.jobs)
        own = {"source": settings.source, "target": settings.target, "jobs": jobs}
        if isinstance(self.found, str):
            return own | {"method": flat_method(settings.method)["method"], "error": self.found}
        seconds = self.found.seconds(jobs)
        return own | self.found.record() | {"seconds": seconds, "memory_bytes": self.found.memory + _CHUNKS}

    def row(self) -> tuple[str, ...]:
        """Return the figures as cells of the table."""
        settings, jobs = self.unit.settings, len(self.unit.jobs)
        if isinstance(self.found, str):
            method = flat_method(settings.method)["method"]
            return settings.source, settings.target, method, str(jobs), "", "", self.found
        found = self.found
        return (
            *(settings.source, settings.target, found.method.name, str(jobs), str(found.modules)),
            *(found.time(jobs), found.size(_CHUNKS)),
        )


def estimate_batch(
    plan: BatchPlan, *, shard: tuple[int, int] = (1, 1), stopwatch: Stopwatch | None = None
) -> Iterator[UnitEstimate]:
    """Estimate the units of a plan, or of a shard, one after the other. No adapter is read, and nothing is written.

    Args:
        plan: see `read_plan`.
        shard: (i, n): only the i-th of n parts.
        stopwatch: times parts of the work on this machine.
    """
    stopwatch = stopwatch or Stopwatch()
    for unit in share_of(units_of(plan.jobs), *shard):
        try:
            yield UnitEstimate(unit, estimate_pair(unit.settings, stopwatch))
        except JCrossLoRAError as error:
            # An adapter without the modules that fail may be moved.
            of_modules = isinstance(error, MethodError | PairingError)
            what = "an adapter of all modules cannot be moved" if of_modules else "cannot be done"
            yield UnitEstimate(unit, f"{what}: {error}")


def print_estimates(plan: BatchPlan, console: Console, *, shard: tuple[int, int] = (1, 1)) -> None:
    """Print a table of what the units of a plan (or of a shard) take, or why they cannot be done."""
    names = ("source", "target", "method", "jobs", "modules", "time", "memory")
    table = Table(*(Column(name, overflow="fold") for name in names))
    for one in estimate_batch(plan, shard=shard):
        table.add_row(*one.row())
    console.print(table, markup=False)
