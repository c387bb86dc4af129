"""What a page is made from: the files of a folder, which adapter is which, and the update in each layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jcrosslora.checkpoint.hub import public_name
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Answers, Scores
from jcrosslora.evaluate.output import answers_json, scores_json
from jcrosslora.report.page.evaluation import Evaluation, Roles, called, parse_evaluation
from jcrosslora.report.record import AGAIN, REPORT, TransferReport, read_bytes, read_report
from jcrosslora.text.completion import COMPLETIONS

_SHOWN = 10
_LAYER = re.compile(r"model\.layers\.(\d{1,3})\.")


@dataclass(frozen=True)
class Contents:
    """What a page shows; what is None or empty is left out of it.

    Attributes:
        texts: some of the texts that the update was fitted to, as far as the source wrote them itself.
    """

    name: str
    moved: TransferReport | None
    evaluation: Evaluation | None
    texts: tuple[str, ...] = ()


def find_contents(folder: Path, answers: Path | None = None, roles: Roles | None = None) -> Contents:
    """Read what a folder holds of a transfer and of an evaluation.

    Args:
        folder: one that `jcrosslora transfer` wrote, or one with the output of `jcrosslora evaluate --json`, or both.
        answers: the output of `jcrosslora evaluate --json`; None takes the one in the folder, if there is one.
        roles: which of the adapters evaluated is which.

    Raises:
        UsageError: there is nothing to show, a file cannot be read or is damaged, or a role names no adapter.
    """
    roles = roles or Roles()
    if not folder.is_dir():
        msg = f"{folder}: is no folder: give one that `jcrosslora transfer` wrote"
        raise UsageError(msg)
    report = folder / REPORT
    moved = _checked(read_report(report), str(report)) if report.exists() else None
    path = answers or _only_evaluation(folder)
    evaluation = None if path is None else parse_evaluation(read_bytes(path), str(path))
    if moved is None and evaluation is None:
        msg = f"{folder}: holds neither {REPORT} nor the output of `jcrosslora evaluate --json` in a .json file: "
        msg += "give a folder that `jcrosslora transfer` wrote"
        raise UsageError(msg)
    name = folder.resolve().name
    if evaluation is None and roles != Roles():
        msg = f"{folder}: no adapter was evaluated, so none has a role: give --answers as well"
        raise UsageError(msg)
    if evaluation is not None:
        evaluation = evaluation.with_parts(roles, name)
    return Contents(name, moved, evaluation, _texts(folder / COMPLETIONS) if moved is not None else ())


def contents_of(report: TransferReport, answers: Answers | Scores | None, roles: Roles, own: str) -> Contents:
    """Take a transfer and an evaluation that are in memory.

    The report is one that `documents.published` returned. The evaluation is of the target with adapters; `own` is the
    name of the moved adapter, if it is among them.

    Raises:
        UsageError: a role names no adapter.
    """
    evaluation = None
    if answers is not None:
        # A name that no adapter has is refused with the other roles.
        shown = {public_name(name) or name: name for name in answers.names[1:]}
        trained = shown.get(called(roles.trained or "", list(shown)) or "")
        if isinstance(answers, Answers):
            data = answers_json(answers, show=_SHOWN, trained=trained)
        else:
            data = scores_json(answers, trained=trained)
        evaluation = parse_evaluation(json.dumps(data).encode(), "the answers")
        evaluation = evaluation.with_parts(roles, own)
    return Contents(report.adapter.name or "adapter", _checked(report, REPORT), evaluation)


def _checked(report: TransferReport, place: str) -> TransferReport:
    if (name := outside_layers(report)) is not None:
        msg = f"{place}: is damaged (module {ascii(name)[:60]}, wanted model.layers.N and so on): {AGAIN}"
        raise UsageError(msg)
    return report


def _only_evaluation(folder: Path) -> Path | None:
    """Return the file of a folder that looks like an evaluation; None if there is none."""
    found = [path for path in sorted(folder.glob("*.json")) if path.is_file() and _is_evaluation(path)]
    if len(found) > 1:
        msg = f"{folder}: holds several evaluations, {', '.join(path.name for path in found)}: name one by --answers"
        raise UsageError(msg)
    return found[0] if found else None


def _is_evaluation(path: Path) -> bool:
    try:
        found = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"models", "not_scored"} <= found.keys()


def _texts(path: Path) -> tuple[str, ...]:
    """Take ten of the texts of a fit, evenly spread.

    Raises:
        UsageError: the file cannot be read, or a line is none that `TransferResult.save` writes.
    """
    if not path.exists():
        return ()
    lines = [line for line in read_bytes(path).split(b"\n") if line.strip()]
    places = sorted({at * len(lines) // _SHOWN for at in range(_SHOWN)}) if lines else []
    return tuple(_text(lines[at], f"{path}:{at + 1}") for at in places)


def _text(line: bytes, place: str) -> str:
    try:
        entry = json.loads(line)
        if "messages" in entry:
            return "\n".join(message["content"] for message in entry["messages"])
        return "".join((entry["prompt"], entry["completion"]))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        msg = f'{place}: is damaged, wanted {{"messages"}} or {{"prompt", "completion"}}: move the adapter again'
        raise UsageError(msg) from error


def outside_layers(report: TransferReport) -> str | None:
    """Return the name of a module that is in no layer, as in a damaged report; None if there is none."""
    names = [row.target for row in report.rows] + [row.source for row in report.rows if row.source]
    names += [one.source for one in report.unmapped_sources]
    return next((name for name in names if _LAYER.match(name) is None), None)


def layer_of(name: str) -> int:
    """Return the number of the layer in a module's name."""
    match = _LAYER.match(name)
    assert match is not None
    return int(match[1])


def layer_norms(report: TransferReport) -> dict[str, dict[int, float]]:
    """Map role and target layer to the norm of the moved update, over all modules of a role such as experts."""
    roles = dict.fromkeys(row.role for row in report.rows)
    squares = {role: _sums(_squares(report, role)) for role in roles}
    return {role: {layer: math.sqrt(value) for layer, value in sorted(of.items())} for role, of in squares.items()}


def target_shares(report: TransferReport) -> dict[int, float]:
    """Map each target layer to its share of the moved update's squared norm."""
    sums = _sums(_squares(report))
    total = sum(sums.values())
    return {layer: value / total for layer, value in sums.items()} if total > 0 else {}


def source_shares(report: TransferReport) -> dict[int, float]:
    """Map each source layer to its share of the original update's squared norm; empty where that is not known."""
    energy = report.energy
    if not energy:
        return {}
    # A source module may feed several of the target.
    found = {row.source: row.energy / energy for row in report.rows if row.source and row.energy is not None}
    found |= {one.source: one.share for one in report.unmapped_sources}
    return _sums((layer_of(name), share) for name, share in found.items())


def left_shares(report: TransferReport) -> dict[int, float]:
    """Map each source layer to the share of the original update that it held and that was not moved."""
    return _sums((layer_of(one.source), one.share) for one in report.unmapped_sources)


def _squares(report: TransferReport, role: str | None = None) -> Iterable[tuple[int, float]]:
    rows = (row for row in report.rows if role in (None, row.role))
    return ((layer_of(row.target), (row.norm_after or 0.0) ** 2) for row in rows)


def _sums(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    sums: dict[int, float] = {}
    for layer, value in pairs:
        sums[layer] = sums.get(layer, 0.0) + value
    return sums
