"""The plan of a batch: adapters, bases and methods; its units, and their estimates."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from glob import glob
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from rich.console import Console
from rich.table import Column

from jcrosslora.adapter.folder import GGUF_ENDING
from jcrosslora.errors import JCrossLoRAError, MethodError, PairingError, UsageError
from jcrosslora.methods import AUTO, find_method, setting_fields
from jcrosslora.session.estimate import Estimate
from jcrosslora.session.settings import OWN_FIELDS, TransferSettings, read_settings, read_table, read_toml
from jcrosslora.session.transfer import estimate_pair
from jcrosslora.utils.terminal import print_table

_Text = Annotated[str, Meta(min_length=1)]
_Names = Annotated[_Text | Annotated[list[_Text], Meta(min_length=1)], Meta(description="a list of names")]
_Ref = Annotated[_Text, Meta(description="a path or hub id")]
_Ends = Annotated[str | dict, Meta(description='a path or hub id, or { ref = "...", revision = "...", id = "..." }')]
_Moves = Annotated[list[dict], Meta(min_length=1, description="at least one table [[moves]] with from and to")]
# The keys of each table; all other keys of a move are settings of the transfer.
_PLAN = {"out": str, "bases": dict, "adapters": dict, "moves": _Moves}
_BASE = {"ref": _Ref, "revision": str, "id": str, "template": str}
_MOVE = {"from": str, "to": _Names, "methods": _Names, "adapters": _Names, "label": str}
# Settings that other tables of the plan, or the batch, determine.
_OWN = ("adapter", "source", "target", "out", "method", "adapter_revision")
_OWN_BASES = ("source_revision", "target_revision", "target_id", "source_template", "target_template")
assert set(_OWN + _OWN_BASES) <= OWN_FIELDS.keys()
# A batch reads the weights of its sources.
_ASKED = tuple(name for name in OWN_FIELDS if name.startswith("source_") and name not in _OWN_BASES)
_WILD = re.compile(r"[*?\[]")
_Base = dict[str, str]  # with the keys of _BASE
# Settings that determine the alignment; all others concern a single adapter.
_ALIGNING = (
    *("source", "target", "source_revision", "target_revision", "target_id", "source_template", "target_template"),
    *("method", "depth", "seed", "prompts", "examples", "probe_count", "cache"),
)
# Bytes of the adapters in a chunk, as float32; the moved adapters take as much again.
CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Job:
    """The move of one adapter to one base by one method; `name` is its output folder's name, unique in the plan."""

    name: str
    settings: TransferSettings


Unit = tuple[Job, ...]  # jobs that share the alignment of the first job's settings, in the order of the plan


@dataclass(frozen=True)
class BatchPlan:
    """All jobs of a batch, in the order of the plan, and the folder that all results are written into."""

    out: Path
    jobs: tuple[Job, ...]


def read_plan(path: str | Path) -> BatchPlan:
    """Read a plan from a TOML file.

    It has `out`, a table `bases` (name = path or hub id, or {ref, revision, id, template}), a table `adapters` (name
    of a base = list of adapters trained on it; the wildcards * ? [] match folders that are not hidden), and at least
    one `[[moves]]`: `from` and `to` name bases, `methods` lists methods, `adapters` selects the base's adapters by
    name, `label` distinguishes moves that would write to one folder, and all other keys are settings of a transfer.
    Paths are relative to the file.

    Raises:
        UsageError: the file cannot be read or does not have this form, names an undefined base, selects no adapter, or
            gives two jobs the same name.
    """
    path = Path(path)
    where, folder = f"plan {path}", path.parent
    plan = read_table(read_toml(path, "plan", 'out = "moved"'), _PLAN, where, required=_PLAN)
    out = folder / _expanded(plan["out"], f"{where}, out")
    bases = read_table(plan["bases"], dict.fromkeys(plan["bases"], _Ends), f"{where}, bases")
    bases = {name: _base(value, folder, f"{where}, base {name}") for name, value in bases.items()}
    adapters = read_table(plan["adapters"], dict.fromkeys(bases, _Names), f"{where}, adapters")
    adapters = {name: _adapters(refs, folder, f"{where}, adapters of {name}") for name, refs in adapters.items()}
    jobs: dict[str, Job] = {}
    for number, move in enumerate(plan["moves"], 1):
        for job in _jobs(move, bases, adapters, folder, out, f"{where}, move {number}"):
            if job.name in jobs:
                first, second = jobs[job.name].settings.adapter, job.settings.adapter
                advice = f", of {first} and {second}; rename one of the two, or name a link to it"
                advice = "; give one of the moves a label" if first == second else advice
                raise UsageError(f"{where}, move {number}: {job.name} is made by two jobs{advice}")
            jobs[job.name] = job
    return BatchPlan(out, tuple(jobs.values()))


def _jobs(
    table: Mapping[str, Any],
    bases: Mapping[str, _Base],
    adapters: Mapping[str, list[str]],
    folder: Path,
    out: Path,
    where: str,
) -> Iterator[Job]:
    if own := [key for key in table if key in _OWN + _OWN_BASES]:
        msg = f"{where} sets {own[0]}, which the plan's bases, adapters, methods and out determine; leave it out"
        raise UsageError(msg)
    if asked := [key for key in table if key in _ASKED]:
        msg = f"{where} sets {asked[0]}, and a batch reads its sources itself: make this transfer by "
        raise UsageError(msg + "`jcrosslora transfer`")
    given = {key: value for key, value in table.items() if key in _MOVE}
    move = read_table(given, _MOVE, where, required=("from", "to"))
    methods, targets = _names(move.get("methods", AUTO)), _names(move["to"])
    known = {method: _known_settings(method, where) for method in methods}  # which registers a user's own method
    rest = {key: value for key, value in table.items() if key not in _MOVE}
    settings = read_settings(rest, where, _MOVE)
    if strange := [key for key in settings if not any(key in names for names in known.values())]:
        msg = f"{where} sets {strange[0]}, which none of its methods has: {', '.join(methods)}; leave it out"
        raise UsageError(msg)
    for key in {"prompts", "examples"} & settings.keys():  # never hub ids
        settings[key] = str(folder / _expanded(settings[key], f"{where}, {key}"))
    source, label = move["from"], move.get("label", "")
    if missing := [name for name in (source, *targets) if name not in bases]:
        raise UsageError(f"{where} names the base {missing[0]!r}; the plan has {', '.join(bases) or 'none'}")
    chosen = _chosen(_names(move.get("adapters", "*")), adapters.get(source, []), source, where)
    for target, method, adapter in itertools.product(targets, methods, chosen):
        name = "--".join(filter(None, (_slug(Path(adapter).name), _slug(target), _slug(method), _slug(label))))
        more = {key: value for key, value in settings.items() if key in known[method]}
        more |= _end("source", bases[source]) | _end("target", bases[target])
        yield Job(name, TransferSettings.of(adapter=adapter, method=method, out=str(out / name), **more))


def _known_settings(method: str, where: str) -> set[str]:
    """Return the allowed settings of a move by this method; `auto` accepts the settings of all methods."""
    try:
        own = setting_fields() if method == AUTO else [field.name for field in fields(find_method(method))]
    except MethodError as error:
        raise MethodError(f"{where}: {error}") from error
    return {*OWN_FIELDS, *own}


def _end(side: str, base: _Base) -> dict[str, str]:
    """Return the settings that a base gives to the source or the target; the source has no id to be written."""
    return {side: base["ref"]} | {f"{side}_{key}": text for key, text in base.items() if f"{side}_{key}" in OWN_FIELDS}


def _chosen(wanted: list[str], refs: list[str], source: str, where: str) -> list[str]:
    named = {pattern: [ref for ref in refs if fnmatchcase(Path(ref).name, pattern)] for pattern in wanted}
    if unknown := [pattern for pattern, found in named.items() if not found]:
        msg = f"{where}: no adapter of {source} is named {unknown[0]}; the plan has {len(refs)} of that base"
        raise UsageError(msg)
    return [ref for ref in refs if any(ref in found for found in named.values())]


def _base(value: str | dict[str, Any], folder: Path, where: str) -> _Base:
    base = read_table({"ref": value} if isinstance(value, str) else value, _BASE, where, required=("ref",))
    base["ref"] = _placed(base["ref"], folder, where)
    if "template" in base:
        base["template"] = str(folder / _expanded(base["template"], f"{where}, template"))
    return base


def _adapters(refs: str | list[str], folder: Path, where: str) -> list[str]:
    found: list[str] = []
    for ref in _names(refs):
        if not _WILD.search(ref) or os.path.exists(folder / _expanded(ref, where)):
            found.append(_placed(ref, folder, where))
            continue
        # It leaves out hidden folders, as a shell does, unless the pattern names them.
        paths = map(folder.joinpath, glob(str(_expanded(ref, where)), root_dir=folder, recursive=True))
        matches = sorted(str(path) for path in paths if path.is_dir() or path.suffix == GGUF_ENDING)
        if not matches:
            raise UsageError(f"{where}: no adapter matches {ref}; note that paths are relative to the plan")
        found += matches
    return list(dict.fromkeys(found))


def _placed(ref: str, folder: Path, where: str) -> str:
    """Resolve a path relative to the plan; return it unchanged if it does not exist, since it may be a hub id."""
    path = folder / _expanded(ref, where)
    return str(path) if os.path.exists(path) else ref


def _expanded(path: str, where: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{where} is {path}, but there is no such home folder; write another path") from error


def _names(value: str | list[str]) -> list[str]:
    """Return one name, or several without repetitions, as a list."""
    return list(dict.fromkeys([value] if isinstance(value, str) else value))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", text).strip("-.")


def units_of(jobs: Sequence[Job]) -> list[Unit]:
    """Group jobs into units, in the order in which they first occur."""
    found: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        found.setdefault(tuple(getattr(job.settings, name) for name in _ALIGNING), []).append(job)
    return [tuple(jobs) for jobs in found.values()]


def cut(units: Sequence[Unit], count: int) -> list[Unit]:
    """Split units, in order, so that none is larger than a fair share of all jobs for `count` workers."""
    fair = max(1, -(-sum(len(unit) for unit in units) // count))
    return [unit[start : start + fair] for unit in units for start in range(0, len(unit), fair)]


def share_of(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Return the units of shard `index` of 1 to `count`.

    All shards together have every job once. Units go, the largest first, to the shard with the fewest jobs so far. A
    unit is split only if it is larger than a shard's fair part, since each part repeats the alignment.

    Raises UsageError if the shard does not exist.
    """
    if not 1 <= index <= count:
        raise UsageError(f"shard {index}/{count} does not exist; write i/n with i from 1 to n")
    parts, loads, mine = cut(units, count), [0] * count, set[int]()
    for number in sorted(range(len(parts)), key=lambda number: -len(parts[number])):
        shard = loads.index(min(loads))
        loads[shard] += len(parts[number])
        if shard == index - 1:
            mine.add(number)
    return [unit for number, unit in enumerate(parts) if number in mine]


@dataclass(frozen=True)
class UnitEstimate:
    """Time and memory of the jobs of a unit, for adapters of all modules; adapters of fewer modules take less.

    Attributes:
        found: the estimate for one adapter, or a message that says why the jobs cannot run.
    """

    unit: Unit
    found: Estimate | str

    def record(self) -> dict[str, Any]:
        """Return the figures as a JSON value."""
        settings, jobs, found = self.unit[0].settings, len(self.unit), self.found
        own = {"source": settings.source, "target": settings.target, "jobs": jobs}
        if isinstance(found, str):
            return own | {"method": settings.flat()["method"], "error": found}
        return own | found.record() | {"seconds": found.seconds(jobs), "memory_bytes": found.memory + 2 * CHUNK_BYTES}

    def row(self) -> tuple[str, ...]:
        """Return the figures as cells of the table."""
        settings, jobs, found = self.unit[0].settings, len(self.unit), self.found
        if isinstance(found, str):
            method, figures = settings.flat()["method"], ("", "", found)
        else:  # with a chunk of adapters, before and after
            method, figures = found.method.name, (str(found.modules), found.time(jobs), found.size(2 * CHUNK_BYTES))
        return settings.source, settings.target, method, str(jobs), *figures


def estimate_batch(plan: BatchPlan, *, shard: tuple[int, int] = (1, 1)) -> Iterator[UnitEstimate]:
    """Estimate the units of a plan or of a shard (i, n); no adapter is read, and nothing is written."""
    for unit in share_of(units_of(plan.jobs), *shard):
        try:
            yield UnitEstimate(unit, estimate_pair(unit[0].settings))
        except JCrossLoRAError as error:
            # An adapter that lacks the failing modules may still move.
            of_modules = isinstance(error, MethodError | PairingError)
            what = "an adapter of all modules cannot be moved" if of_modules else "cannot be done"
            yield UnitEstimate(unit, f"{what}: {error}")


def print_estimates(plan: BatchPlan, console: Console, *, shard: tuple[int, int] = (1, 1)) -> None:
    """Print a table of the estimates of a plan's units (or a shard's), or why they cannot be done."""
    names = ("source", "target", "method", "jobs", "modules", "time", "memory")
    columns = [Column(name, overflow="fold") for name in names]
    print_table(console, columns, (one.row() for one in estimate_batch(plan, shard=shard)))
