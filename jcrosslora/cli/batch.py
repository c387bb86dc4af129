"""`jcrosslora batch`: run many transfers from a plan."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import tyro
from rich.console import Console

from jcrosslora.cli.output import FailOn, Long, exit_code, print_json
from jcrosslora.errors import BatchError, UsageError
from jcrosslora.utils.logs import LogName

if TYPE_CHECKING:
    from jcrosslora.session.batch import Summary


@dataclass(frozen=True)
class Batch(Long):
    """Run many transfers from a plan: each pair of bases is aligned once, and finished jobs are skipped."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "cluster": ("shard", "ray", "ray_cpus", "ray_gpus"),
        **Long.GROUPS,
    }

    plan: tyro.conf.Positional[Path]
    """A TOML file: out, [bases], [adapters] and [[moves]]; see docs/batches-and-clusters.md."""
    allow_module: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Allow the plan to import this Python module with methods; may be given several times."""
    dry_run: bool = False
    """Only show the jobs, finished ones included, with an estimate of time and memory."""
    overwrite: bool = False
    """Replace adapter folders that were made from other input."""
    json: bool = False
    """Print the summary, or the estimates, as JSON instead of the table."""
    fail_on: FailOn = "never"
    """no-effect: exit with code 3 if a verdict expects no effect, or harm, or nothing was measured;
    the adapters are still written."""
    log: LogName | None = None
    """Log each job to Weights & Biases, Trackio or TensorBoard; each needs its extra."""
    shard: str = "1/1"
    """i/n: run only the i-th of n parts, for n machines."""
    ray: str | None = None
    """Run on the workers of a Ray cluster: HOST:PORT, auto for the cluster of this machine, or local."""
    ray_cpus: float | None = None
    """CPUs of a worker; all of the smallest machine if not given."""
    ray_gpus: float | None = None
    """GPUs of a worker; all of the smallest machine that has any if not given."""

    def written(self) -> str:
        """Return the folder of all adapters."""
        from jcrosslora.session.batch import read_plan

        return str(read_plan(self.plan).out)

    def run(self, console: Console) -> int:
        from jcrosslora.methods import allow_module
        from jcrosslora.session.batch import estimate_batch, print_estimates, read_plan, run_batch, run_on_ray

        for module in self.allow_module:
            allow_module(module)
        plan, shard = read_plan(self.plan), _shard(self.shard)
        if self.log is not None and self.ray is not None:
            msg = f"log {self.log!r} is of this process, and --ray has others do the work: leave one of them out"
            raise UsageError(msg)
        if self.ray is None and (self.ray_cpus is not None or self.ray_gpus is not None):
            raise UsageError("--ray-cpus and --ray-gpus are for a cluster: name it with --ray, or leave them out")
        if self.dry_run:
            if self.json:
                print_json([one.record() for one in estimate_batch(plan, shard=shard)])
            else:
                print_estimates(plan, console, shard=shard)
            return 0
        shared: dict[str, Any] = {"shard": shard, "overwrite": self.overwrite}
        try:
            if self.ray is None:
                summary = run_batch(plan, **shared, log=self.log)
            else:
                summary = run_on_ray(plan, address=self.ray, cpus=self.ray_cpus, gpus=self.ray_gpus, **shared)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("finished jobs stay, and the same command goes on from there") from None
        if self.json:
            sys.stdout.write(summary.to_json())
        else:
            summary.print_to(console)
        if failed := summary.count("failed"):
            msg = f"{failed} of {len(summary.outcomes)} jobs failed; their reasons are in the summary in {plan.out}"
            raise BatchError(msg)
        return exit_code(self.fail_on, _levels(summary))


def _levels(summary: "Summary") -> Iterator[str]:
    """Read the verdicts' levels from the reports next to the adapters, of this run and of earlier ones."""
    from jcrosslora.report import REPORT, read_report

    for outcome in summary.outcomes.values():
        path = Path(outcome.out) / REPORT
        if outcome.status in ("done", "kept") and path.is_file():
            yield read_report(path).verdict.level


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UsageError(f"shard {text!r} is not of the form i/n, such as 1/4")
    return int(index), int(count)
