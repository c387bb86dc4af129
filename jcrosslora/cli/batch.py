"""`jcrosslora batch`: run many transfers from a plan; and `cache`: list, verify and clear the cache on disk."""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro
from rich.console import Console
from rich.table import Column
from rich.text import Text

from jcrosslora.cli.main import INTERRUPTED, fail
from jcrosslora.cli.output import FailOn, Long, exit_code, print_json, print_table, say
from jcrosslora.errors import BatchError, CacheError, UsageError
from jcrosslora.utils.cache import Cache, cache_root
from jcrosslora.utils.cache_entries import Entry
from jcrosslora.utils.logs import LogName

if TYPE_CHECKING:
    from jcrosslora.session.batch import Summary


Kind = Literal["all", "factors", "transport", "vocabulary", "depth", "texts"]
_TEXTS = "texts"


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
    """no-effect: exit with code 3 if a verdict expects no effect, or harm; the adapters are still written."""
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
            return fail("interrupted; finished jobs stay, and the same command goes on from there", INTERRUPTED)
        if self.json:
            sys.stdout.write(summary.to_json())
        else:
            summary.print_to(console)
        if failed := summary.count("failed"):
            msg = f"{failed} of {len(summary.outcomes)} jobs failed; their reasons are above and in the summary"
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
        msg = f"shard {text!r} is not of the form i/n, such as 1/4"
        raise UsageError(msg)
    return int(index), int(count)


@dataclass(frozen=True)
class List:
    """Show every entry with its kind, content, size and last use, and the total."""

    json: bool = False
    """Print the entries as JSON."""

    def run(self, console: Console) -> None:
        cache, entries = _opened()
        if self.json:
            shown = [
                {"kind": one.kind, "content": one.what, "path": str(one.path), "bytes": one.size, "used": one.used}
                for one in entries
            ]
            print_json({"folder": str(cache.root), "limit": cache.limit, "entries": shown})
            return
        rows = (
            (one.kind, Text(one.what), _megabytes(one), time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used)))
            for one in reversed(entries)
        )
        columns = [Column(name, overflow="fold") for name in ("kind", "content", "size", "last used")]
        columns[2].justify = "right"
        if entries:
            print_table(console, columns, rows)
        limit = f"{cache.limit / 1e6:,.1f} MB"
        say(console, f"{cache.root}: {len(entries)} entries, {_megabytes(*entries)}; without texts at most {limit}")


@dataclass(frozen=True)
class Verify:
    """Compare every byte with its digest; exit with 2 if an entry is damaged and was not removed."""

    remove: bool = False
    """Remove damaged entries; they are made again when needed."""

    def run(self, console: Console) -> None:
        cache, entries = _opened()
        damaged = 0
        for entry in entries:
            if (reason := _verify(cache, entry)) is not None:
                damaged += 1
                say(console, f"{entry.path}: {reason}")
                if self.remove:
                    _remove(cache, entry)
        if damaged and not self.remove:
            msg = f"{cache.root}: {damaged} of {len(entries)} entries are damaged; remove them with --remove"
            raise CacheError(msg)
        removed = f", {damaged} damaged ones were removed" if damaged else ""
        say(console, f"{cache.root}: {len(entries) - damaged} entries are whole{removed}")


@dataclass(frozen=True)
class Clear:
    """Remove all entries, or those of one kind."""

    kind: Kind = "all"
    """The kind of entries to remove."""

    def run(self, console: Console) -> None:
        cache, entries = _opened(self.kind)
        for entry in entries:
            _remove(cache, entry)
        say(console, f"{cache.root}: {len(entries)} entries removed, {_megabytes(*entries)}")


CACHE_ACTIONS = {"list": List, "verify": Verify, "clear": Clear}


def _opened(kind: Kind = "all") -> tuple[Cache, list[Entry]]:
    """Return the cache, and its entries of a kind, those first that were not used for the longest time."""
    from jcrosslora.evaluate.probes import TEXTS

    root = cache_root()
    if root is None:
        msg = "no cache folder: the user has no home folder; name one in the environment variable JCROSSLORA_CACHE"
        raise CacheError(msg)
    cache = Cache(root)
    found = [] if kind == _TEXTS else [*cache.entries(None if kind == "all" else kind)]
    for path in (root / TEXTS).glob("*.json") if kind in ("all", _TEXTS) else ():
        if path.is_file():
            stat = path.stat()
            found += [Entry(_TEXTS, path.stem, path, "texts that a base wrote", stat.st_size, stat.st_mtime)]
    return cache, sorted(found, key=lambda entry: entry.used)


def _verify(cache: Cache, entry: Entry) -> str | None:
    if entry.kind != _TEXTS:
        return cache.verify(entry)
    from jcrosslora.evaluate.probes import find_texts

    return "its content differs from what was written" if find_texts(entry.key) is None else None


def _remove(cache: Cache, entry: Entry) -> None:
    try:
        if entry.kind == _TEXTS:
            entry.path.unlink(missing_ok=True)
        else:
            cache.remove(entry)
    except OSError as error:
        msg = f"{entry.path}: cannot be removed ({error.strerror}): make the folder writable, or remove it yourself"
        raise CacheError(msg) from error


def _megabytes(*entries: Entry) -> str:
    return f"{sum(entry.size for entry in entries) / 1e6:,.1f} MB"
