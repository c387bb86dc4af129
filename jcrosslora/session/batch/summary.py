"""The outcomes of a batch's jobs, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Column, Table

from jcrosslora.checkpoint.hub import publish
from jcrosslora.errors import OutputError
from jcrosslora.session.batch.plan_file import Job
from jcrosslora.utils.files import write_whole

Status = Literal["done", "kept", "failed", "open"]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job.

    Attributes:
        name: name of the job.
        out: its folder.
        status: "done" in this run, "kept" from an earlier run, "failed", or "open" (not reached).
        text: the verdict on the moved adapter, or the error.
        seconds: time since the end of the previous job; for the first job of a unit this includes the shared work.
    """

    name: str
    out: str
    status: Status = "open"
    text: str = ""
    seconds: float = 0.0


@dataclass
class Summary:
    """The outcomes of all jobs of a run, by name, in the order of the plan; jobs not reached are open."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def count(self, status: Status) -> int:
        """Count the jobs with a status."""
        return sum(outcome.status == status for outcome in self.outcomes.values())

    def to_json(self) -> str:
        """Return the counts and every outcome as JSON."""
        counts = {status: self.count(status) for status in ("done", "kept", "failed", "open")}
        return json.dumps({**counts, "jobs": [asdict(one) for one in self.outcomes.values()]}, indent=2) + "\n"

    def save(self, path: Path, jobs: Iterable[Job]) -> None:
        """Write `to_json` to a file, atomically and without local paths.

        Args:
            path: of the file.
            jobs: of the outcomes.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, self._public(jobs).to_json().encode())
        except OSError as error:
            msg = f"{path}: cannot be written ({error.strerror}): make it writable, or free space"
            raise OutputError(msg) from error

    def _public(self, jobs: Iterable[Job]) -> Summary:
        paths = {job.name: job.settings.paths() for job in jobs if job.name in self.outcomes}
        return Summary({name: Outcome(**publish(asdict(self.outcomes[name]), own)) for name, own in paths.items()})

    def print_to(self, console: Console) -> None:
        """Print a table of all jobs."""
        table = Table(Column("job", overflow="fold"), "status", "s", Column(overflow="fold"), title_justify="left")
        for one in self.outcomes.values():
            table.add_row(one.name, one.status, f"{one.seconds:.1f}" if one.seconds else "", one.text)
        console.print(table, markup=False)  # print brackets in names and reasons literally
