"""Run a plan on a Ray cluster with a shared file system: each worker runs one unit at a time."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jcrosslora.errors import UsageError
from jcrosslora.session.batch.outcomes import Outcome, Summary
from jcrosslora.session.batch.plan import BatchPlan, Unit, cut, share_of, units_of
from jcrosslora.session.batch.run import do_unit, summarised
from jcrosslora.utils.progress import track

LOCAL = "local"
_RETRIES = 1  # Ray runs a unit again if its worker died
_PATIENCE = 30  # seconds to wait for a connection to the cluster
# The command sets the same for itself: threads of OpenBLAS and JAX would compete for the cores.
_OF_WORKERS = {"OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
_PASSED_ON = ("JCROSSLORA_", "JAX_", "XLA_", "HF_")  # prefixes of the environment variables that workers receive


def run_on_ray(
    plan: BatchPlan,
    *,
    address: str,
    cpus: float | None = None,
    gpus: float | None = None,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
) -> Summary:
    """Run all unfinished jobs of a plan, or of a shard, on the workers of a Ray cluster; see `run_batch`.

    Every machine of the cluster must have this package, and see the plan's folder, its files and the current folder
    under the same paths. If the worker of a unit dies, the unit is retried. If the retry dies too, its jobs run one by
    one, so that only the job that kills a worker fails.

    Args:
        address: HOST:PORT or ray://HOST:PORT of the cluster, "auto" for the cluster that this machine belongs to, or
            "local" for a new cluster of this machine's processes. Ignored if Ray is initialised.
        cpus: CPUs for a unit; None takes all CPUs of the smallest machine.
        gpus: GPUs for a unit; None takes all GPUs of the smallest machine with GPUs.

    Returns:
        The outcome of each job; also written as by `run_batch`.

    Raises:
        UsageError: Ray is not installed, the cluster cannot be reached, no machine has the resources that a unit takes,
            or the shard does not exist.
        OutputError: the summary cannot be written.
    """
    mine = share_of(units_of(plan.jobs), *shard)
    with _cluster(address) as ray:
        takes, slots = _division([node["Resources"] for node in ray.nodes() if node["Alive"]], cpus, gpus)
        units = cut(mine, slots)
        with summarised(plan, units, shard) as summary, track(len(summary.outcomes), "batch", "jobs") as bar:
            passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
            environment = {"env_vars": _OF_WORKERS | passed}
            task = ray.remote(_work).options(**takes, max_retries=_RETRIES, runtime_env=environment)
            for outcome in _outcomes(ray, task, units, (plan.out, overwrite, os.getcwd())):
                summary.outcomes[outcome.name] = outcome
                bar.update()
    return summary


def _outcomes(ray: Any, task: Any, units: Sequence[Unit], rest: tuple[Any, ...]) -> Iterator[Outcome]:
    """Yield the outcome of each job as soon as its unit is done."""
    # Start the largest first, so that no worker is left alone with a large unit in the end.
    order = sorted(units, key=len, reverse=True)
    running = {task.remote(unit, *rest): unit for unit in order}
    try:
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            unit = running.pop(ready)
            try:
                yield from ray.get(ready)
            except ray.exceptions.RayError as error:
                job, *others = unit
                if others:
                    running |= {task.remote((job,), *rest): (job,) for job in unit}
                    continue
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                text = f"the worker died with it {_RETRIES + 1} times ({reason[:500]})"
                yield Outcome(job.name, job.settings.out, "failed", text)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _work(unit: Unit, out: Path, overwrite: bool, folder: str) -> list[Outcome]:
    """Run a unit in a worker."""
    from jcrosslora.utils.cache import keep_compiled

    os.chdir(folder)  # the plan's paths are relative to it
    keep_compiled()
    return do_unit(unit, out, overwrite)


def _division(
    machines: Sequence[dict[str, float]], cpus: float | None, gpus: float | None
) -> tuple[dict[str, float], int]:
    """Return the resources of a unit, and how many units can run at a time."""
    if any(number is not None and not number >= 0 for number in (cpus, gpus)):
        raise UsageError(f"a unit cannot take {cpus} CPUs and {gpus} GPUs; give numbers from 0 on, or none for all")
    if gpus is None:
        gpus = min((machine["GPU"] for machine in machines if machine.get("GPU")), default=0)
    able = [machine for machine in machines if machine.get("CPU") and machine.get("GPU", 0) >= gpus]
    if cpus is None:
        cpus = min((machine["CPU"] for machine in able), default=1)
    asked = [(name, number) for name, number in (("CPU", cpus), ("GPU", gpus)) if number]
    slots = sum(int(min((machine.get(name, 0) / number for name, number in asked), default=1)) for machine in able)
    if not slots:
        msg = f"no machine of the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs free for a unit; ask for fewer"
        raise UsageError(msg)
    return {"num_cpus": cpus, "num_gpus": gpus}, slots


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Connect Ray to a cluster for the block; an existing connection is used and kept."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError("Ray is not installed: pip install 'jcrosslora[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        try:
            _reach(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"no Ray cluster can be reached at {address} ({error}); start one by `ray start --head`, give its "
                f"HOST:PORT, or use {LOCAL}"
            ) from error
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _reach(address: str) -> None:
    """Check that HOST:PORT accepts connections, or raise an `OSError`; Ray itself would wait without a limit."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
