"""The end of every transfer: ranks as the format holds them, the check of the effect, and the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jcrosslora.adapter import Adapter, update_norm
from jcrosslora.adapter.lora_xs import READERS, Known, truncate_for_profile
from jcrosslora.adapter.save import Profile
from jcrosslora.checkpoint import BaseModel
from jcrosslora.maps.shift import Shifted
from jcrosslora.maps.shifted import ModuleRow
from jcrosslora.maps.transport import Transport
from jcrosslora.methods import Method, Moved
from jcrosslora.report.documents import complete
from jcrosslora.report.record import (
    Base,
    MeasuredEffect,
    Recipe,
    Row,
    SourceAdapter,
    TransferReport,
    Unmapped,
    cut,
    defined,
    spread,
    taken,
)
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.utils import version
from jcrosslora.utils.logs import record

if TYPE_CHECKING:
    from jcrosslora.evaluate.effect import Effect

_EXAMPLES = 10  # completions of a fit that the report shows

# Measures the effect of the moved adapter: what it found, if anything, and what the user has to know.
Check = Callable[[Adapter], "tuple[Effect | None, tuple[str, ...]]"]


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        method: the method of the transfer.
        reason: why `auto` chose it; None if the user named it.
        options: the options of the transfer.
        profile: the intended file format of the result.
        queried: settings by which the source was queried, where its weights were not read.
        rank: the rank of the source adapter, where its factors were not read; None if that is not known.
        known: singular vectors of the target's weights that other adapters needed; new ones are added.
    """

    method: Method
    reason: str | None
    options: TransferOptions
    profile: Profile = "peft"
    queried: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    known: Known = field(default_factory=dict)


def conclude(
    request: Request,
    transport: Transport,
    shifted: Shifted,
    update: Moved,
    target: BaseModel,
    *,
    check: Check | None = None,
) -> TransferResult:
    """Bring an update to the ranks of its format, check its effect, and report on it.

    Args:
        request: what was asked for.
        transport: how the bases were aligned, with or without its groups.
        shifted: the adapter behind the maps.
        update: what the method made of it.
        target: the base of the update.
        check: measures the effect; None leaves it unmeasured.
    """
    options = request.options
    moved = dataclasses.replace(shifted.adapter, modules=update.adapter.modules)
    norms = {row.target: row.norm_after for row in shifted.rows} if shifted.calibration == "frobenius" else None
    moved, truncation, frozen = truncate_for_profile(
        moved, target, request.profile, options.out_rank, norms, request.known
    )
    effect, warnings = (None, ()) if check is None else check(moved)
    changed = update.adapter is not shifted.adapter or truncation is not None
    texts = tuple(item.text for item in update.completions)
    rows = _rows(shifted, update, moved, target) if changed else shifted.rows
    report = TransferReport(
        version=version(),
        recipe=taken(Recipe, transport.recipe),
        source=taken(Base, transport.source),
        target=taken(Base, transport.target),
        adapter=taken(SourceAdapter, shifted.original.info),
        calibration=shifted.calibration,
        scale=shifted.scale,
        layers=transport.pairing.layers,
        rows=tuple(taken(Row, row) for row in rows),
        unmapped_targets=tuple(name for name in transport.pairing.unmapped_targets if name not in moved.modules),
        # A fit uses the whole adapter, so no source module is left out.
        unmapped_sources=() if update.fitted else tuple(taken(Unmapped, one) for one in shifted.unmapped),
        energy=defined(shifted.energy),
        warnings=(*transport.warnings, *shifted.notes, *(() if frozen is None else (READERS,)), *warnings),
        out_rank=options.out_rank if truncation is None else truncation.rule,
        choice=request.reason,
        effect=None if effect is None else MeasuredEffect.of(effect),
        fitted=update.fitted,
        curve=tuple(update.curve),
        added=update.added,
        wrote_prompts=update.wrote_prompts,
        examples=tuple(map(cut, spread(texts, _EXAMPLES))) if update.wrote_prompts else (),
        truncation=truncation,
        rank_before=max(_ranks(shifted.original).values(), default=request.rank),
        ranks=_ranks(moved),
        tokens=shifted.tokens,
        asked=dict(request.queried),
    )
    report = complete(report, request.method)
    record(report.figures)
    kept = update.completions if update.wrote_prompts else ()
    return TransferResult(moved, report, transport.target, texts, frozen, update.chat_template, kept)


def _rows(shifted: Shifted, update: Moved, moved: Adapter, target: BaseModel) -> tuple[ModuleRow, ...]:
    """Return the account of each module of the moved adapter, in the target's order."""
    norms = {name: update_norm(factors) for name, factors in moved.modules.items()}
    if not update.fitted:
        return tuple(dataclasses.replace(row, norm_after=norms.get(row.target, row.norm_after)) for row in shifted.rows)
    # The share that the maps kept is undefined for a fitted update.
    rows = {row.target: dataclasses.replace(row, norm_after=0.0, kept=math.nan) for row in shifted.rows}
    for name, norm in norms.items():
        row = rows.get(name) or ModuleRow.unmapped(name, target.modules[name].role)
        rows[name] = dataclasses.replace(row, norm_after=norm)
    places = {name: place for place, name in enumerate(target.modules)}
    return tuple(sorted(rows.values(), key=lambda row: places.get(row.target, len(places))))


def _ranks(adapter: Adapter) -> dict[str, int]:
    """Return the rank of each module, and of each parameter of experts."""
    of_experts = {update.name: update.a.shape[1] for update in adapter.experts}
    return {name: factors.rank for name, factors in adapter.modules.items()} | of_experts
