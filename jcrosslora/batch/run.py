"""Run a plan: every pair is aligned once, all its adapters are shifted together, and what is done stays done."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jcrosslora.adapter import Adapter
from jcrosslora.alignment.align import Plan
from jcrosslora.alignment.transport import describe_base
from jcrosslora.batch.completion_log import CompletionLog, base_fingerprint, fingerprint_of
from jcrosslora.batch.plan_file import BatchPlan, Job
from jcrosslora.batch.summary import Outcome, Status, Summary
from jcrosslora.batch.units import Unit, share_of, units_of
from jcrosslora.cache.keys import digest_of
from jcrosslora.checkpoint import BaseModel
from jcrosslora.distributed import hosts
from jcrosslora.errors import JCrossLoRAError, UsageError
from jcrosslora.lineage.method_selection import Choice, by_maps
from jcrosslora.methods import Method, get_method
from jcrosslora.report.verdict import verdict
from jcrosslora.session.second_stage import Ways, fit_behind
from jcrosslora.session.transfer import (
    TransferSettings,
    check_move,
    chosen,
    in_span,
    lighter,
    load_for,
    open_both,
    plan_of,
    probes_of,
    shifter_of,
    transfer,
    with_account,
    write_moved,
)
from jcrosslora.shifting.lora_xs_span import Known
from jcrosslora.shifting.shift import MovedAdapter, Shifter, add_to_all
from jcrosslora.utils.files import ensure_free
from jcrosslora.utils.memory import enough_memory
from jcrosslora.utils.progress import Track, track

# Adapters in memory at a time, in bytes as float32, with as much again for what they become.
CHUNK_BYTES = 256 * 2**20
SUMMARY = "batch_summary.json"


def run_batch(
    plan: BatchPlan,
    *,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Do all jobs of a plan that are not done yet.

    Jobs are independent: one that fails is listed, and the others go on. What has been written stays, whatever
    happens; the same call goes on from there and writes the same bytes as an undisturbed run.

    Args:
        plan: see `read_plan`.
        shard: (i, n): only the i-th of n parts, for n runs side by side. Their results go to the same folder.
        overwrite: whether adapter folders that were made from other input may be replaced.
        progress: whether to show progress bars.

    Returns:
        What became of each job; also written to `batch_summary.json` in the plan's folder (of part i of n to
        `batch_summary.i-of-n.json`), even if the run is interrupted.

    Raises:
        UsageError: no such shard, or a process that works with others by `jax.distributed`.
        OutputError: the summary cannot be written.
    """
    if hosts.count() > 1:
        msg = "a batch is not done by several processes together; start each alone, with a shard i/n of its own"
        raise UsageError(msg)
    units = share_of(units_of(plan.jobs), *shard)
    with (
        summarised(plan, units, shard) as summary,
        track(len(summary.outcomes), "batch", "jobs", show=progress) as bar,
    ):
        run = _Run(CompletionLog(plan.out), summary, bar, overwrite, progress)
        for unit in units:
            run.do(unit)
    return summary


@contextmanager
def summarised(plan: BatchPlan, units: Sequence[Unit], shard: tuple[int, int]) -> Iterator[Summary]:
    """A block that does some units of a plan; what it enters into the summary is saved, however it ends.

    Raises:
        OutputError: the summary cannot be written.
    """
    mine = {job.name for unit in units for job in unit.jobs}
    summary = Summary({job.name: Outcome(job.name, job.settings.out) for job in plan.jobs if job.name in mine})
    name = SUMMARY if shard == (1, 1) else SUMMARY.replace(".json", f".{shard[0]}-of-{shard[1]}.json")
    try:
        yield summary
    finally:
        summary.save(plan.out / name)


def do_unit(unit: Unit, out: Path, overwrite: bool) -> list[Outcome]:
    """What became of the jobs of one unit, done here and now.

    Args:
        unit: of a plan.
        out: the plan's folder.
        overwrite: as for `run_batch`.
    """
    summary = Summary({job.name: Outcome(job.name, job.settings.out) for job in unit.jobs})
    with track(len(unit.jobs), "batch", "jobs", show=False) as bar:
        _Run(CompletionLog(out), summary, bar, overwrite, False).do(unit)
    return list(summary.outcomes.values())


@dataclass(frozen=True, eq=False)
class _Way:
    """How jobs of a unit are done: the method, and the reason for it where it was chosen."""

    method: Method
    choice: Choice | None


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A job whose adapter fits its base: what is known of it while its factors are not in memory."""

    job: Job
    way: _Way
    fingerprint: str
    sources: tuple[str, ...]
    size: int


def _way(method: str, choice: Choice | None) -> _Way:
    return _Way(get_method(method if choice is None else choice.method), choice)


class _Run:
    def __init__(self, log: CompletionLog, summary: Summary, bar: Track, overwrite: bool, progress: bool) -> None:
        self._log, self._summary, self._bar = log, summary, bar
        self._overwrite, self._progress = overwrite, progress
        self._since = time.monotonic()
        self._read: dict[str, Adapter] = {}  # of the unit that is being done, by the name of the job
        self._room = 0  # bytes for more of them

    def do(self, unit: Unit) -> None:
        """All jobs of a unit; what goes wrong for all of them is the outcome of each."""
        self._since = time.monotonic()
        try:
            with enough_memory(lighter(unit.settings.method)):
                self._do(unit)
        except JCrossLoRAError as error:
            for job in unit.jobs:
                if self._summary.outcomes[job.name].status == "open":
                    self._close(job, "failed", str(error))

    def _do(self, unit: Unit) -> None:
        settings = unit.settings
        source, target, cache = open_both(settings)
        found, choice = chosen(settings, source, target)
        usual = _way(settings.method, choice)
        mapped = _way(settings.method, None if choice is None else by_maps(choice))  # for aLoRA
        self._read, self._room = {}, CHUNK_BYTES
        shared = base_fingerprint(source), base_fingerprint(target), _texts_digest(settings)
        every = [self._load(job, source, target, usual, mapped, shared) for job in unit.jobs]
        loaded = [item for item in every if item is not None]
        self._close_kept(loaded)  # whatever becomes of the others
        for name, way in {way.method.name: way for way in (usual, mapped)}.items():
            items = [item for item in loaded if item.way.method.name == name]
            if way.method.fits:
                for item in items:
                    self._alone(item)
            elif not all(map(self._kept, items)):

                def plan_for(sources: Collection[str], name: str = name) -> Plan:
                    return plan_of(settings, source, target, name, sources, cache, found)

                fitting, plan = self._planned(items, plan_for)
                if plan is not None:
                    self._together(fitting, plan, source, target, hold=cache is None)
        self._close_kept(loaded)  # by another run meanwhile

    def _planned(
        self, items: Sequence[_Loaded], plan_for: Callable[[Collection[str]], Plan]
    ) -> tuple[Sequence[_Loaded], Plan | None]:
        """The jobs that can be aligned, with a plan for all of them; one whose own modules cannot fails alone."""
        kinds = dict.fromkeys(item.sources for item in items)  # most adapters have the same modules
        try:
            return items, plan_for({name for kind in kinds for name in kind})
        except JCrossLoRAError:
            if len(kinds) == 1:
                raise
        reasons = {kind: _why_not(plan_for, kind) for kind in kinds}
        for item in items:
            if reasons[item.sources] and not self._kept(item):
                self._close(item.job, "failed", reasons[item.sources])
        fitting = [item for item in items if not reasons[item.sources]]
        return fitting, plan_for({name for item in fitting for name in item.sources}) if fitting else None

    def _close_kept(self, loaded: Sequence[_Loaded]) -> None:
        for item in loaded:
            if self._summary.outcomes[item.job.name].status == "open" and self._kept(item):
                self._close(item.job, "kept")

    def _load(
        self,
        job: Job,
        source: BaseModel,
        target: BaseModel,
        usual: _Way,
        mapped: _Way,
        shared: tuple[str, str, str],
    ) -> _Loaded | None:
        """Check a job's adapter and its output before anything is computed; `shared` ends the input of `fingerprint_of`."""
        try:
            adapter = load_for(job.settings, source, target)
            way = usual if adapter.info.invocation is None else mapped
            check_move(job.settings, adapter, target, way.method)
            mover = shifter_of(job.settings, adapter, describe_base(source), way.method.name)
            fingerprint = fingerprint_of(job, adapter.info, *shared)
            if not self._log.is_done(job, fingerprint):
                ensure_free(job.settings.out, self._overwrite)
        except JCrossLoRAError as error:
            self._close(job, "failed", str(error))
            return None
        size = sum(4 * factors.rank * sum(factors.shape) for factors in mover.adapter.modules.values())
        size += sum(4 * update.numbers for update in mover.adapter.tokens)
        if not way.method.fits:
            self._hold(job, adapter, size)
        return _Loaded(job, way, fingerprint, tuple(mover.adapter.modules), size)

    def _hold(self, job: Job, adapter: Adapter, size: int) -> None:
        """Hold an adapter that has been read until it is moved, as long as there is room for what a chunk holds."""
        self._room -= size
        if self._room >= 0 or not self._read:
            self._read[job.name] = adapter

    def _alone(self, item: _Loaded) -> None:
        """A method that fits an update to one adapter."""
        if self._kept(item):
            return
        settings = dataclasses.replace(item.job.settings, overwrite=self._overwrite)

        def move() -> MovedAdapter:
            with self._log.writing(item.job, item.fingerprint):
                return transfer(settings, progress=self._progress)

        self._attempt(item, move)

    def _together(
        self,
        loaded: Sequence[_Loaded],
        plan: Plan,
        source: BaseModel,
        target: BaseModel,
        *,
        hold: bool,
    ) -> None:
        # Done jobs keep their place among the others: the same program on the same arrays gives the same bytes.
        chunks = [chunk for chunk in _chunks(loaded) if not all(map(self._kept, chunk))]
        needed = {item.job.name for chunk in chunks for item in chunk}
        self._read = {name: adapter for name, adapter in self._read.items() if name in needed}
        plan.probes = probes_of(loaded[0].job.settings, source, plan, self._progress)
        # Without a cache the groups of several chunks have to stay in memory.
        held = tuple(plan.groups(progress=self._progress)) if hold and len(chunks) > 1 else None
        info = describe_base(source)
        known: Known = {}
        ways: Ways = {}
        for chunk in chunks:
            movers = [
                shifter_of(item.job.settings, self._adapter(item, source, target), info, plan.method.name)
                for item in chunk
            ]
            for group in plan.groups(progress=self._progress) if held is None else held:
                add_to_all(movers, group)
            for item, mover in zip(chunk, movers, strict=True):
                if not self._kept(item):
                    self._attempt(item, partial(self._finish, item, mover, plan, source, target, known, ways))

    def _adapter(self, item: _Loaded, source: BaseModel, target: BaseModel) -> Adapter:
        """The adapter of a job, held since it was checked or read again."""
        held = self._read.pop(item.job.name, None)
        return load_for(item.job.settings, source, target) if held is None else held

    def _finish(
        self,
        item: _Loaded,
        mover: Shifter,
        plan: Plan,
        source: BaseModel,
        target: BaseModel,
        known: Known,
        ways: Ways,
    ) -> MovedAdapter:
        """What is left to do with a mapped adapter."""
        settings, choice, shown = item.job.settings, item.way.choice, self._progress
        moved = mover.finish(plan.transport(()), (source, target))
        both, share = (source, target), settings.interpolation
        moved, _ = fit_behind(plan.method, *both, mover.adapter, moved, interpolation=share, ways=ways, progress=shown)
        moved, frozen = in_span(settings, target, moved, known)
        moved = with_account(settings, source, target, mover.adapter, moved, choice, plan.probes, progress=shown)
        with self._log.writing(item.job, item.fingerprint):
            write_moved(dataclasses.replace(settings, overwrite=self._overwrite), moved, frozen)
        return moved

    def _attempt(self, item: _Loaded, work: Callable[[], MovedAdapter]) -> None:
        """List a job as done, or as failed, unless another run has done it meanwhile."""
        try:
            with enough_memory(lighter(item.way.method.name)):
                moved = work()
        except JCrossLoRAError as error:
            if not self._kept(item):
                self._close(item.job, "failed", str(error))
        else:
            assert moved.report is not None
            self._close(item.job, "done", verdict(moved.report).text)

    def _kept(self, item: _Loaded) -> bool:
        return self._log.is_done(item.job, item.fingerprint)

    def _close(self, job: Job, status: Status, text: str = "") -> None:
        now = time.monotonic()
        seconds = 0.0 if status == "kept" else now - self._since
        self._since = now
        self._summary.outcomes[job.name] = Outcome(job.name, job.settings.out, status, text, seconds)
        self._bar.update()


def _why_not(plan_for: Callable[[Collection[str]], Plan], modules: Collection[str]) -> str:
    """Why modules cannot be aligned, "" if they can."""
    try:
        plan_for(modules)
    except JCrossLoRAError as error:
        return str(error)
    return ""


def _texts_digest(settings: TransferSettings) -> str:
    """What the user's probe texts are for a job: the same for all of a unit, however long they are."""
    if settings.probe_text is None:
        return ""
    from jcrosslora.evidence.probes import read_texts

    return digest_of(*read_texts(settings.probe_text))


def _chunks(loaded: Sequence[_Loaded]) -> Iterator[list[_Loaded]]:
    chunk: list[_Loaded] = []
    size = 0
    for item in loaded:
        if chunk and size + item.size > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += item.size
    if chunk:
        yield chunk
