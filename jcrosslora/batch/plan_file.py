"""The plan of a batch: which adapters go from which base to which others, and how."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jcrosslora.adapter.folder import GGUF_ENDING
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.methods import AUTO, find_method, setting_fields
from jcrosslora.session.settings import OWN_FIELDS, TransferSettings, check_settings, read_toml

_TABLES = ("out", "bases", "adapters", "moves")
_BASE_KEYS = ("ref", "revision", "name", "template")
# Keys of a move; all other keys are settings of the transfer.
_MOVE_KEYS = ("from", "to", "methods", "adapters", "label")
# Settings that the plan's other tables or the batch itself determine.
_OWN = ("adapter", "source", "target", "out", "method", "overwrite", "adapter_revision")
_OWN_BASES = ("source_revision", "target_revision", "target_name", "source_template", "target_template")
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Job:
    """One adapter to one base by one method.

    Attributes:
        name: name of the folder that it writes, unique in the plan.
        settings: the settings of the transfer.
    """

    name: str
    settings: TransferSettings


@dataclass(frozen=True)
class BatchPlan:
    """All jobs of a batch, in the order of the plan.

    Attributes:
        out: the folder that all results are written into.
        jobs: at least one.
    """

    out: Path
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class _Base:
    ref: str
    revision: str | None = None
    name: str | None = None
    template: str | None = None


def read_plan(path: str | Path) -> BatchPlan:
    """Read a plan from a TOML file.

    It has `out`, a table `bases` (name = path or hub id, or {ref, revision, name, template}), a table `adapters` (name
    of a base = list of adapters trained on it; the wildcards * ? [] match folders that are not hidden), and at least
    one `[[moves]]`: `from` and `to` name bases, `methods` lists methods, `adapters` selects the base's adapters by
    name, `label` distinguishes moves that would write to one folder, and all other keys are settings of a transfer.
    Paths are relative to the file.

    Raises:
        UsageError: the file cannot be read or does not have this form, names an undefined base, selects no adapter, or
            gives two jobs the same name.
    """
    path = Path(path)
    values = read_toml(path, "plan", 'out = "moved"')
    place = f"plan {path}"
    _refuse_unknown(values, _TABLES, place)
    folder = path.parent
    out = folder / _expanded(_typed(values, "out", str, place), f"{place}, out")
    bases = {name: _base(value, folder, f"{place}, base {name}") for name, value in _table(values, "bases", place)}
    adapters = {
        base: _adapters(refs, folder, f"{place}, adapters of {base}")
        for base, refs in _table(values, "adapters", place)
    }
    for name in adapters:
        _check_base(name, bases, f"{place}, adapters,")
    moves = _typed(values, "moves", list, place)
    jobs: dict[str, Job] = {}
    for number, move in enumerate(moves, 1):
        for job in _jobs(move, bases, adapters, folder, out, f"{place}, move {number}"):
            if job.name in jobs:
                msg = f"{place}, move {number}: {job.name} is made by two jobs{_clash(job, jobs[job.name])}"
                raise UsageError(msg)
            jobs[job.name] = job
    if not jobs:
        msg = f"{place} has no moves; write at least one [[moves]] with from, to and methods"
        raise UsageError(msg)
    return BatchPlan(out, tuple(jobs.values()))


def _clash(job: Job, other: Job) -> str:
    """Advise how to give two jobs different names."""
    names = other.settings.adapter, job.settings.adapter
    if names[0] == names[1]:
        return "; give one of the moves a label"
    return f", of {names[0]} and {names[1]}; rename one of the two, or name a link to it"


def _jobs(
    move: Any,
    bases: Mapping[str, _Base],
    adapters: Mapping[str, list[str]],
    folder: Path,
    out: Path,
    place: str,
) -> Iterator[Job]:
    if not isinstance(move, dict):
        msg = f"{place} is {move!r}; write it as a table, [[moves]]"
        raise UsageError(msg)
    settings = {key: value for key, value in move.items() if key not in _MOVE_KEYS}
    methods = _names(move, "methods", [AUTO], place)
    known = _known_settings(methods, place)
    own = [key for key in settings if key in _OWN + _OWN_BASES]
    if own:
        msg = f"{place} sets {own[0]}, which the plan's bases, adapters, methods and out determine; leave it out"
        raise UsageError(msg)
    check_settings(settings, place)
    hyper = {key: settings.pop(key) for key in list(settings) if key not in OWN_FIELDS}
    for key in hyper:
        if not any(key in names for names in known.values()):
            msg = f"{place} sets {key}, which none of its methods has: {', '.join(methods)}; leave it out"
            raise UsageError(msg)
    if "probe_text" in settings:  # never a hub id
        settings["probe_text"] = str(folder / _expanded(settings["probe_text"], f"{place}, probe_text"))
    source, label = _typed(move, "from", str, place), move.get("label", "")
    if not isinstance(label, str):
        msg = f"{place} has the label {label!r}; it must be text"
        raise UsageError(msg)
    targets = _names(move, "to", None, place)
    for name in (source, *targets):
        _check_base(name, bases, place)
    chosen = _chosen(move, adapters.get(source, []), source, place)
    for target in targets:
        for method in methods:
            own_settings = settings | {key: value for key, value in hyper.items() if key in known[method]}
            for adapter in chosen:
                name = "--".join(filter(None, (_slug(Path(adapter).name), _slug(target), _slug(method), _slug(label))))
                yield Job(name, _settings(adapter, bases[source], bases[target], method, out / name, own_settings))


def _known_settings(methods: list[str], place: str) -> dict[str, set[str]]:
    """Return the hyper-parameters of each method of a move; `auto` accepts those of all methods."""
    try:
        return {
            method: set(setting_fields())
            if method == AUTO
            else {field.name for field in dataclasses.fields(find_method(method))}
            for method in methods
        }
    except MethodError as error:
        msg = f"{place}: {error}"
        raise MethodError(msg) from error


def _check_base(name: str, bases: Mapping[str, _Base], place: str) -> None:
    if name not in bases:
        msg = f"{place} names the base {name!r}; the plan has {', '.join(bases) or 'none'}"
        raise UsageError(msg)


def _settings(
    adapter: str, source: _Base, target: _Base, method: str, out: Path, more: Mapping[str, Any]
) -> TransferSettings:
    return TransferSettings.of(
        adapter=adapter,
        source=source.ref,
        target=target.ref,
        out=str(out),
        method=method,
        source_revision=source.revision,
        target_revision=target.revision,
        target_name=target.name,
        source_template=source.template,
        target_template=target.template,
        **more,
    )


def _chosen(move: Mapping[str, Any], refs: list[str], source: str, place: str) -> list[str]:
    wanted = _names(move, "adapters", ["*"], place)
    found = [ref for ref in refs if any(fnmatch.fnmatchcase(Path(ref).name, pattern) for pattern in wanted)]
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(Path(ref).name, pattern) for ref in refs):
            msg = f"{place}: no adapter of {source} is named {pattern}; the plan has {len(refs)} of that base"
            raise UsageError(msg)
    return found


def _base(value: Any, folder: Path, place: str) -> _Base:
    if isinstance(value, str):
        value = {"ref": value}
    if not isinstance(value, dict) or not isinstance(value.get("ref"), str):
        msg = f'{place} is {value!r}; write a path or hub id, or {{ ref = "...", revision = "...", name = "..." }}'
        raise UsageError(msg)
    _refuse_unknown(value, _BASE_KEYS, place)
    check_settings({f"target_{key}": value[key] for key in _BASE_KEYS[1:] if key in value}, place)
    template = value.get("template")
    placed = {"ref": _placed(value["ref"], folder, place)}
    if template is not None:
        placed["template"] = str(folder / Path(template).expanduser())
    return dataclasses.replace(_Base(**value), **placed)


def _adapters(refs: Any, folder: Path, place: str) -> list[str]:
    found: list[str] = []
    for ref in _list_of_text(refs, place):
        if not _WILD.search(ref):
            found.append(_placed(ref, folder, place))
            continue
        pattern = _expanded(ref, place)
        root = Path(pattern.anchor) if pattern.is_absolute() else folder
        parts = pattern.relative_to(pattern.anchor) if pattern.is_absolute() else pattern
        visible = (path for path in root.glob(str(parts)) if not _is_hidden(path.relative_to(root), parts))
        matches = sorted(str(path) for path in visible if path.is_dir() or path.suffix == GGUF_ENDING)
        if not matches:
            msg = f"{place}: no adapter matches {ref}; note that paths are relative to the plan"
            raise UsageError(msg)
        found += matches
    return list(dict.fromkeys(found))


def _is_hidden(path: Path, pattern: Path) -> bool:
    """Tell whether a path has a hidden folder although its pattern names none, as in a shell."""
    found, named = ([part for part in one.parts if part[0] == "." and part != ".."] for one in (path, pattern))
    return bool(found) and not named


def _placed(ref: str, folder: Path, place: str) -> str:
    """Resolve a path relative to the plan; return it unchanged if it does not exist, since it may be a hub id."""
    path = folder / _expanded(ref, place)
    return str(path) if os.path.exists(path) else ref


def _expanded(path: str, place: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        msg = f"{place} is {path}, but there is no such home folder; write another path"
        raise UsageError(msg) from error


def _names(table: Mapping[str, Any], key: str, default: list[str] | None, place: str) -> list[str]:
    value = table.get(key, default)
    if value is None:
        msg = f"{place} has no {key}; it must be a list of names"
        raise UsageError(msg)
    return list(dict.fromkeys(_list_of_text(value, f"{place}, {key}")))


def _list_of_text(value: Any, place: str) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or not all(isinstance(item, str) and item for item in items):
        msg = f"{place} is {value!r}; it must be a list of names"
        raise UsageError(msg)
    return items


def _table(values: Mapping[str, Any], key: str, place: str) -> list[tuple[str, Any]]:
    return list(_typed(values, key, dict, place).items())


def _typed(values: Mapping[str, Any], key: str, kind: type, place: str) -> Any:
    wanted = {str: "text", dict: "a table", list: "a list of tables"}[kind]
    if not isinstance(values.get(key), kind):
        came = repr(values[key]) if key in values else "missing"
        msg = f"{place}: {key} is {came}; it must be {wanted}"
        raise UsageError(msg)
    return values[key]


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in values:
        if key not in known:
            msg = f"{place} has an unknown entry {key!r}; it may have {', '.join(known)}"
            raise UsageError(msg)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_+-]+", "-", text).strip("-.")


assert set(_OWN + _OWN_BASES) <= OWN_FIELDS.keys()
