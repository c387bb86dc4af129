"""Group jobs that share an alignment into units, and divide the units among shards."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from jcrosslora.errors import UsageError
from jcrosslora.session.batch.plan_file import Job
from jcrosslora.session.settings import TransferSettings

# Settings that determine the alignment; all others concern a single adapter.
_ALIGNING = (
    *("source", "target", "source_revision", "target_revision", "target_name", "source_template", "target_template"),
    *("method", "depth", "seed", "probe_text", "probe_count", "cache"),
)


@dataclass(frozen=True)
class Unit:
    """Jobs that share one alignment.

    Attributes:
        jobs: at least one, in the order of the plan.
    """

    jobs: tuple[Job, ...]

    @property
    def settings(self) -> TransferSettings:
        """Return the settings of the first job; those that determine the alignment are the same in all jobs."""
        return self.jobs[0].settings


def units_of(jobs: Sequence[Job]) -> list[Unit]:
    """Group jobs into units, in the order in which they first occur."""
    found: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        found.setdefault(tuple(getattr(job.settings, name) for name in _ALIGNING), []).append(job)
    return [Unit(tuple(jobs)) for jobs in found.values()]


def cut(units: Sequence[Unit], count: int) -> list[Unit]:
    """Split units into units no larger than a fair part of all jobs for `count` workers, in the same order."""
    fair = max(1, -(-sum(len(unit.jobs) for unit in units) // count))
    return [Unit(unit.jobs[start : start + fair]) for unit in units for start in range(0, len(unit.jobs), fair)]


def share_of(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Return the units of shard `index` of 1 to `count`.

    All shards together have every job once. Units go, the largest first, to the shard with the fewest jobs so far. A
    unit is split only if it is larger than a shard's fair part, since each part repeats the alignment.

    Raises:
        UsageError: the shard does not exist.
    """
    if not 1 <= index <= count:
        msg = f"shard {index}/{count} does not exist; write i/n with i from 1 to n"
        raise UsageError(msg)
    parts = list(enumerate(cut(units, count)))
    loads = [(0, shard) for shard in range(count)]
    mine = []
    for place, unit in sorted(parts, key=lambda part: (-len(part[1].jobs), part[0])):
        load, shard = heapq.heappop(loads)
        heapq.heappush(loads, (load + len(unit.jobs), shard))
        if shard == index - 1:
            mine.append((place, unit))
    return [unit for _, unit in sorted(mine, key=lambda part: part[0])]
