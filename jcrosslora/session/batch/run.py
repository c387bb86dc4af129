"""Run a batch unit by unit: a unit is a session of one pair of bases, with adapters in chunks of bounded memory."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from jcrosslora.adapter import Adapter
from jcrosslora.errors import JCrossLoRAError
from jcrosslora.maps.align import ALIGN, align_groups
from jcrosslora.maps.method import Plan
from jcrosslora.maps.planning import with_text
from jcrosslora.methods import make_method
from jcrosslora.session.batch import outcomes
from jcrosslora.session.batch.outcomes import CompletionLog, Outcome, Status, Summary
from jcrosslora.session.batch.plan import CHUNK_BYTES, BatchPlan, Job, Unit, share_of, units_of
from jcrosslora.session.result import TransferResult
from jcrosslora.session.session import out_of_memory_advice
from jcrosslora.session.transfer import job_of, save_as, session_of, text_of
from jcrosslora.utils.cost import check_devices, enough_memory
from jcrosslora.utils.files import ensure_free
from jcrosslora.utils.logs import LogName, find_log, log_to
from jcrosslora.utils.progress import Track, say, shows_progress, track
from jcrosslora.utils.unfinished import remove_unfinished

SUMMARY = "batch_summary.json"


def run_batch(
    plan: BatchPlan, *, shard: tuple[int, int] = (1, 1), overwrite: bool = False, log: LogName | None = None
) -> Summary:
    """Run all unfinished jobs of a plan, see `read_plan`.

    Jobs are independent: one that fails is listed, and the others go on. Finished results are kept after any
    interruption; the same call resumes from there and writes the same bytes as an uninterrupted run.

    Args:
        shard: (i, n): only the i-th of n parts, for n parallel runs. Their results go to the same folder.
        overwrite: whether adapter folders that were made from other input may be replaced.
        log: where each job has a run with its figures, see `log_to`; None for none.

    Returns:
        The outcome of each job; also written to `batch_summary.json` in the plan's folder (for part i of n to
        `batch_summary.i-of-n.json`), even if the run is interrupted.

    Raises:
        UsageError: the shard does not exist, or the package of the log is not installed.
        OutputError: the summary cannot be written.
    """
    check_devices()
    if log is not None:
        find_log(log)
    units = share_of(units_of(plan.jobs), *shard)
    with summarised(plan, units, shard) as summary, track(len(summary.outcomes), "batch", "jobs") as bar:
        run = _Run(CompletionLog(plan.out), summary, bar, overwrite, log)
        for unit in units:
            run.do(unit)
    return summary


@contextmanager
def summarised(plan: BatchPlan, units: Sequence[Unit], shard: tuple[int, int]) -> Iterator[Summary]:
    """Provide a summary to a block that runs some units of a plan, and save it however the block ends."""
    mine = {job.name for unit in units for job in unit}
    summary = Summary.of(job for job in plan.jobs if job.name in mine)
    name = SUMMARY if shard == (1, 1) else SUMMARY.replace(".json", f".{shard[0]}-of-{shard[1]}.json")
    try:
        yield summary
    finally:
        remove_unfinished(plan.out, mine)  # left by killed workers or by an earlier run
        summary.save(plan.out / name, plan.jobs)


def do_unit(unit: Unit, out: Path, overwrite: bool) -> list[Outcome]:
    """Run one unit in this process and return the outcomes of its jobs."""
    summary = Summary.of(unit)
    _Run(CompletionLog(out), summary, Track(None, len(unit)), overwrite).do(unit)
    return list(summary.outcomes.values())


@dataclass(frozen=True, eq=False)
class _Checked:
    """A checked job whose factors need not be in memory.

    Attributes:
        plan: the plan, without the adapter.
        stamp: the fingerprint without reading the adapter, see `stamp_of`.
        size: bytes of the adapter's factors as float32.
    """

    job: Job
    plan: Plan
    fingerprint: str
    stamp: str | None
    sources: tuple[str, ...]
    size: int


@dataclass
class _Run:
    """What all units of a run share: the completion log, the outcomes so far, and the options of `run_batch`."""

    log: CompletionLog
    summary: Summary
    bar: Track
    overwrite: bool
    figures: LogName | None = None
    since: float = 0.0

    def do(self, unit: Unit) -> None:
        """Run all jobs of a unit; an error of the whole unit becomes the outcome of each job."""
        self.since = time.monotonic()
        try:
            with enough_memory(out_of_memory_advice(make_method(unit[0].settings.method))):
                _UnitRun(self, unit).do()
        except JCrossLoRAError as error:
            for job in filter(self.is_open, unit):
                self.close(job, "failed", str(error))

    def is_open(self, job: Job) -> bool:
        """Tell whether a job has no outcome yet."""
        return self.summary.outcomes[job.name].status == "open"

    def is_done(self, item: _Checked) -> bool:
        """Tell whether a job's result exists already."""
        return self.log.has(item.job, "fingerprint", item.fingerprint)

    def attempt(self, item: _Checked, work: Callable[[], TransferResult]) -> None:
        """Run a job and write its result; list it as failed if it fails."""
        settings = item.job.settings
        try:
            with enough_memory(out_of_memory_advice(item.plan.method)):
                with log_to(self.figures, item.job.name, replace(settings, method=item.plan.method).published()):
                    result = work()
                if self.is_done(item):  # jobs that another run finished meanwhile
                    return
                with self.log.writing(item.job, item.fingerprint, item.stamp):
                    save_as(result, replace(settings, overwrite=self.overwrite))
        except JCrossLoRAError as error:
            if not self.is_done(item):
                self.close(item.job, "failed", str(error))
        else:
            self.close(item.job, "done", result.verdict.text)

    def close(self, job: Job, status: Status, text: str = "") -> None:
        """List the outcome of a job."""
        before, self.since = self.since, time.monotonic()
        seconds = 0.0 if status == "kept" else self.since - before
        self.summary.outcomes[job.name] = Outcome(job.name, job.settings.out, status, text, seconds)
        self.bar.update()


class _UnitRun:
    """The run of one unit: its jobs are checked, then aligned together, then moved in chunks."""

    def __init__(self, run: _Run, unit: Unit) -> None:
        self._run, self._unit = run, unit
        self._session = session_of(unit[0].settings)
        self._first = job_of(unit[0].settings, text_of(unit[0].settings))  # all jobs have the same text
        self._read: dict[str, Adapter] = {}  # adapters held in memory until they are moved, by the name of the job
        self._room = CHUNK_BYTES

    def do(self) -> None:
        """Run all unfinished jobs of the unit."""
        self._session.take_digests()
        pair = self._session.pair
        assert pair is not None  # a batch has no sources that can only be queried
        texts = "" if self._first.probes is None else self._first.probes.digest()
        shared = outcomes.base_fingerprint(pair.source), outcomes.base_fingerprint(pair.target), texts
        stamps = [(job, outcomes.stamp_of(job, *shared)) for job in self._unit]
        if all(self._run.log.has(job, "stamp", stamp) for job, stamp in stamps):
            for job in self._unit:
                self._run.close(job, "kept")
            return
        checked = [item for item in (self._check(job, shared, stamp) for job, stamp in stamps) if item is not None]
        self._close_kept(checked)  # before other jobs can fail
        for method in dict.fromkeys(item.plan.method for item in checked):
            items = [item for item in checked if item.plan.method == method]
            if not all(map(self._run.is_done, items)):
                self._move(items)
        self._close_kept(checked)  # jobs that another run finished meanwhile

    def _check(self, job: Job, shared: tuple[str, str, str], stamp: str | None) -> _Checked | None:
        """Check the adapter and the output of a job before anything is computed."""
        try:
            adapter = self._load(job)
            plan = self._plan(job, adapter)
            fingerprint = outcomes.fingerprint_of(job, adapter.info, *shared)
            if not self._run.log.has(job, "fingerprint", fingerprint):
                ensure_free(job.settings.out, self._run.overwrite)
        except JCrossLoRAError as error:
            self._run.close(job, "failed", str(error))
            return None
        for sentence in plan.mismatch_warnings if shows_progress() else ():
            say(f"warning: {job.name}: {sentence}")
        factors = plan.adapter
        size = sum(4 * item.rank * sum(item.shape) for item in factors.modules.values())
        size += sum(4 * update.numbers for update in factors.tokens)
        self._room -= size
        if self._room >= 0 or not self._read:
            self._read[job.name] = adapter
        return _Checked(job, replace(plan, adapter=Adapter({})), fingerprint, stamp, tuple(factors.modules), size)

    def _move(self, items: Sequence[_Checked]) -> None:
        """Move adapters through one alignment, in chunks."""
        # Finished jobs keep their position in their chunk: the same program on the same arrays gives the same bytes.
        chunks = [chunk for chunk in _chunks(items) if not all(map(self._run.is_done, chunk))]
        session, options = self._session, self._first.options
        if items[0].plan.method.runs_bases and sum(not self._run.is_done(item) for item in items) > 1:
            session.keep_bases(items[0].plan.method, options)
        needed = {item.job.name for chunk in chunks for item in chunk}
        self._read = {name: adapter for name, adapter in self._read.items() if name in needed}
        alignment = replace(items[0].plan, sources=frozenset(name for item in items for name in item.sources) or None)
        with session.steps(alignment, options, timed=False) as steps:
            alignment = with_text(alignment)
            if alignment.pair.store is None and len(chunks) > 1:
                # Without a cache the groups stay in memory for all chunks.
                alignment = replace(alignment, groups=tuple(align_groups(alignment)))
            for chunk in chunks:
                found = [self._plan(one.job, self._load(one.job)) for one in chunk]
                text = {"probes": alignment.probes, "batches": alignment.batches}
                plans = [replace(session.ready(plan, self._first), **text) for plan in found]
                steps.begin_again(ALIGN)
                session.map_together(plans, alignment)
                for item, plan in zip(chunk, plans, strict=True):
                    steps.begin_again(ALIGN)  # every adapter is moved by itself
                    if not self._run.is_done(item):
                        job = job_of(item.job.settings, self._first.probes)
                        self._run.attempt(item, partial(session.finish, plan, job))

    def _plan(self, job: Job, adapter: Adapter) -> Plan:
        return self._session.plan(job_of(job.settings, self._first.probes), adapter)

    def _load(self, job: Job) -> Adapter:
        """Return the adapter of a job, from memory or read again."""
        adapter = self._read.pop(job.name, None) or self._session.load(job_of(job.settings, self._first.probes))
        assert adapter is not None  # both bases are read
        return adapter

    def _close_kept(self, items: Sequence[_Checked]) -> None:
        for item in items:
            if self._run.is_open(item.job) and self._run.is_done(item):
                self._run.close(item.job, "kept")


def _chunks(items: Sequence[_Checked]) -> Iterator[list[_Checked]]:
    chunk: list[_Checked] = []
    for item in items:
        if chunk and sum(one.size for one in (*chunk, item)) > CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(item)
    yield chunk
