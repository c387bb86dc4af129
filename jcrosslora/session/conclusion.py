"""Finish a transfer: truncate ranks for the output format, check the effect, and make the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import structs

from jcrosslora.adapter import Adapter, Carried, TokenUpdate, fit_to_base, update_norm
from jcrosslora.adapter.records import AdapterOrigin, left_out
from jcrosslora.adapter.save import Profile
from jcrosslora.adapter.truncation import truncate_fused
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import LoadedBases, fast_dtype
from jcrosslora.errors import CheckpointError, ShortMemoryError, UsageError
from jcrosslora.evaluate.effect import Effect, adapter_texts, check_effect
from jcrosslora.evaluate.probes import Probes
from jcrosslora.maps.shifted import ModuleRow, Shifted, TokenRow, defined
from jcrosslora.maps.transport import Transport
from jcrosslora.methods import Auto, Method, Moved, Task
from jcrosslora.relation import why_not_run
from jcrosslora.report import MeasuredEffect, TransferReport, complete, record
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.utils import logs, version
from jcrosslora.utils.cost import enough_memory
from jcrosslora.utils.progress import begin
from jcrosslora.utils.spread import spread_evenly

EFFECT = "measure the effect"  # the step of a transfer, as it names itself on the display
_EXAMPLES = 10  # completions of a fit that the report shows

# Measures the effect of the moved adapter: what it found, if anything, and what the user has to know.
Check = Callable[[Adapter], tuple[Effect | None, tuple[str, ...]]]


@dataclass(frozen=True, eq=False)
class Request:
    """A request to a session: move an adapter by a method, or estimate that.

    Attributes:
        adapter: in memory, a path or a hub id; None for a server, which has its own. An estimate takes None for an
            adapter that has all modules of the source.
        probes: the user's text; None if there is none.
        profile: the file format that the result is meant for.
        revision: of the adapter's hub id.
        rank: read no update of the adapter at more than this rank. A source that can only be queried reads all.
        alpha: of LoRA of a JAX trainer that does not hold it.
    """

    adapter: Any
    method: Method | Auto
    options: TransferOptions
    probes: Probes | None = None
    profile: Profile = "peft"
    revision: str | None = None
    rank: int | None = None
    alpha: float | None = None

    @property
    def texts(self) -> int:
        """The number of different texts that the user gave."""
        return 0 if self.probes is None else len(set(self.probes.texts))

    @property
    def examples(self) -> int:
        """The number of labelled examples among the user's text."""
        return 0 if self.probes is None else len(self.probes.examples)


@dataclass(frozen=True, eq=False)
class Move:
    """A checked request, with its method.

    Attributes:
        reason: why `auto` chose the method; None if the user named it.
        queried: settings by which the source was queried, if its weights were not read.
        rank: the rank of the source adapter, if its factors were not read; None if that is not known.
        doubts: what speaks against the source as the base of the adapter, and against a move at all.
    """

    request: Request
    method: Method
    reason: str | None
    queried: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    doubts: tuple[str, ...] = ()


def conclude(
    move: Move, transport: Transport, shifted: Shifted, update: Moved, target: BaseModel, *, check: Check | None = None
) -> TransferResult:
    """Bring an update to the ranks of its format, check its effect, and report on it.

    Args:
        transport: how the bases were aligned, with or without its groups.
        update: the update that the method made.
        check: measures the effect; None leaves it unmeasured.
    """
    options = move.request.options
    moved = fit_to_base(replace(update.adapter, info=shifted.adapter.info), transport.target)
    norms = None
    if shifted.calibration == "frobenius":  # what a method added to the mapped update counts as well
        norms = {name: update_norm(moved.modules[name]) for name in shifted.adapter.modules if name in moved.modules}
    moved, truncation = truncate_fused(moved, target.fused, options.out_rank, norms)
    effect, more = (None, ()) if check is None else check(moved)
    changed = update.adapter is not shifted.adapter or truncation is not None
    texts = tuple(item.text for item in update.completions)
    rows = _rows(shifted, update, moved, target) if changed else shifted.rows
    report = TransferReport(
        version=version(),
        recipe=transport.recipe,
        source=record.taken(record.Base, transport.source),
        target=record.taken(record.Base, transport.target),
        adapter=record.taken(AdapterOrigin, shifted.original.info),
        calibration=shifted.calibration,
        scale=shifted.scale,
        layers=transport.pairing.layers,
        rows=rows,
        unmapped_targets=tuple(name for name in transport.pairing.unmapped_targets if name not in moved.modules),
        # A fit uses the whole adapter, so no source module is left out.
        unmapped_sources=shifted.unmapped if update.fit is None else (),
        energy=defined(shifted.energy),
        warnings=(*transport.warnings, *shifted.notes, *_left_by(move.method, shifted, moved), *update.warnings, *more),
        out_rank=options.out_rank if truncation is None else truncation.rule,
        choice=move.reason,
        effect=None if effect is None else MeasuredEffect.of(effect),
        fit=update.fit,
        curve=tuple(update.curve),
        added=update.added,
        wrote_prompts=update.wrote_prompts,
        examples=spread_evenly(texts, _EXAMPLES) if update.wrote_prompts else (),
        truncation=truncation,
        rank_before=max(_ranks(shifted.original).values(), default=move.rank),
        ranks=_ranks(moved),
        tokens=_token_rows(shifted, moved),
        asked=dict(move.queried),
    )
    report = complete(report, move.method)
    logs.record(report.figures)
    kept = update.completions if update.wrote_prompts else ()
    return TransferResult(moved, report, transport.target, texts, update.chat_template, kept)


def _left_by(method: Method, shifted: Shifted, moved: Adapter) -> tuple[str, ...]:
    """Say what the maps carried, and the method did not return."""
    held = Carried.EVERYTHING
    held &= held if moved.tokens else ~Carried.TOKENS
    held &= held if moved.experts else ~Carried.EXPERTS
    return tuple(f"not moved: {text}" for text in left_out(shifted.adapter, held, f"method {method.name} left it out"))


def _token_rows(shifted: Shifted, moved: Adapter) -> tuple[TokenRow, ...]:
    """Return the account of each change of embedding and head: those that the maps carried, then the method's."""

    def accounts(row: TokenRow, update: TokenUpdate) -> bool:
        return row.kind == update.kind and not set(row.modules).isdisjoint(update.modules)

    # A row of which no token moved has no update.
    rows = [row for row in shifted.tokens if not row.moved or any(accounts(row, one) for one in moved.tokens)]
    new = [one for one in moved.tokens if not any(accounts(row, one) for row in rows)]
    return *rows, *(TokenRow(one.modules, one.kind, len(one.ids), len(one.ids)) for one in new)


def _rows(shifted: Shifted, update: Moved, moved: Adapter, target: BaseModel) -> tuple[ModuleRow, ...]:
    """Return the account of each module of the moved adapter, in the target's order."""
    norms = {name: defined(update_norm(factors)) for name, factors in moved.modules.items()}
    if update.fit is None:
        return tuple(structs.replace(row, norm_after=norms.get(row.target, 0.0)) for row in shifted.rows)
    # The share that the maps kept is undefined for a fitted update.
    rows = {row.target: structs.replace(row, norm_after=0.0, kept=None) for row in shifted.rows}
    for name, norm in norms.items():
        row = rows.get(name) or ModuleRow.unmapped(name, target.modules[name].role)
        rows[name] = structs.replace(row, norm_after=norm)
    places = {name: place for place, name in enumerate(target.modules)}
    return tuple(sorted(rows.values(), key=lambda row: places.get(row.target, len(places))))


def _ranks(adapter: Adapter) -> dict[str, int]:
    """Return the rank of each module, and of each parameter of experts."""
    of_experts = {update.name: update.a.shape[1] for update in adapter.experts}
    return {name: factors.rank for name, factors in adapter.modules.items()} | of_experts


def measure_effect(
    task: Task, moved: Adapter, move: Move, texts: Sequence[str], written: Sequence[str]
) -> tuple[Effect | None, tuple[str, ...]]:
    """Measure the effects of the moved adapter and of the original, if the options request it.

    Args:
        task: both bases, with the original adapter; it loads one base at a time if it has no loaded bases.
        texts: that both bases were run on.
        written: texts that the source wrote with its adapter. An adapter trained on answers hardly shows in text of
            another kind, so these come first.

    Returns:
        The effect, or None if it is not requested or cannot be measured, and warnings.

    Raises:
        UsageError: the effect is requested "always", and there is no text to measure it on.
        CheckpointError: it is requested "always", and a base cannot be run.
    """
    options, runs_bases = move.request.options, move.method.runs_bases
    source, original, loaded = task.base, task.adapter, task.loaded
    if not options.checks_effect(runs_bases=runs_bases):
        return None, ()
    begin(EFFECT)
    # A method that runs the bases has already shown that they can be run.
    if not runs_bases and (obstacle := why_not_run(source, task.target)) is not None:
        raise CheckpointError(f"the effect cannot be measured: {obstacle}; leave out --effect always")
    try:
        with enough_memory("leave out the check with --effect never"):
            if written:
                texts = ()
            else:
                written = _texts(source, original, options.seed, loaded)
            if not texts and not written:
                return None, ()
            found = check_effect((source, original), (task.target, moved), texts, written=written, loaded=loaded)
    # A finished transfer is not given up for a check that was not requested.
    except (UsageError, ShortMemoryError) as error:
        if options.effect == "always":
            raise
        return None, (f"the effect was not measured: {error}",)
    return found, ()


def _texts(source: BaseModel, original: Adapter, seed: int, loaded: LoadedBases | None) -> Sequence[str]:
    """Let the source write with its adapter; its weights are dropped afterwards unless `loaded` keeps them."""
    model = None if loaded is None else loaded.model(source, fast_dtype())
    return adapter_texts(source, original, seed=seed, model=model)
