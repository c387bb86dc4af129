"""The share of an update that each layer holds, for the pictures of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from jcrosslora.report.record import TransferReport

_LAYER = re.compile(r"model\.layers\.(\d{1,3})\.")


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
