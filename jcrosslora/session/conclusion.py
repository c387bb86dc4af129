"""Finish a transfer: truncate ranks for the output format, check the effect, and make the report."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from jcrosslora.adapter import Adapter, AdapterInfo, Carried, TokenUpdate, fit_to_base, update_norm
from jcrosslora.adapter.kinds.dora import DORA
from jcrosslora.adapter.records import AdapterOrigin, left_out
from jcrosslora.adapter.truncation import truncate_fused
from jcrosslora.checkpoint import BaseModel, describe_base
from jcrosslora.decoder import fast_dtype
from jcrosslora.errors import CheckpointError, ShortMemoryError, UsageError
from jcrosslora.evaluate.effect import Effect, adapter_texts, check_effect
from jcrosslora.maps.method import Plan
from jcrosslora.maps.moved import ModuleRow, TokenRow, none_if_nan
from jcrosslora.maps.record import recipe_of, source_info, warnings_of
from jcrosslora.methods import Moved
from jcrosslora.relation import why_not_run
from jcrosslora.report import TransferReport, complete, record
from jcrosslora.session.job import Job
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.utils import logs, version
from jcrosslora.utils.cost import enough_memory
from jcrosslora.utils.picking import pick_evenly
from jcrosslora.utils.progress import begin

EFFECT = "measure the effect"  # the step of a transfer, as it names itself on the display
_EXAMPLES = 10  # completions of a fit that the report shows

_WITHOUT_TOKENS = "where the bases were run, it was without the changes of the embedding and the output head"


def conclude(plan: Plan, moved: Moved, job: Job) -> TransferResult:
    """Truncate an update to the ranks of its format, check its effect, and report on it."""
    options, target, source = job.options, plan.target, plan.adapter
    # A method may return a new adapter without the rows of the maps that it started from.
    account = plan.mapped or Moved(Adapter({}))
    before, described = source_info(plan), describe_base(target)
    adapter = fit_to_base(replace(moved.adapter, info=_info(plan)), described)
    norms = None
    if plan.keeps_norm:  # what a method added to the mapped update counts as well
        norms = {
            name: update_norm(adapter.modules[name]) for name in account.adapter.modules if name in adapter.modules
        }
    adapter, truncation = truncate_fused(adapter, target.fused, options.out_rank, norms)
    effect, found = _effect(plan, moved, adapter, options)
    same = plan.queried is None and before.digest == described.digest
    notes = *_losses(plan.adapter.info, same_weights=same), *account.warnings, *_left_out(plan, account, adapter)
    notes = *notes, *moved.warnings
    rows = moved.rows or account.rows
    if moved.adapter is not account.adapter or truncation is not None:
        rows = _rows(rows, moved, adapter, target)
    texts = tuple(item.text for item in moved.completions)
    energies = [update_norm(factors) ** 2 for factors in source.modules.values()]
    report = TransferReport(
        version=version(),
        recipe=recipe_of(plan, moved.kernels or account.kernels),
        source=record.copy_fields(record.Base, before),
        target=record.copy_fields(record.Base, described),
        adapter=record.copy_fields(AdapterOrigin, source.info),
        calibration="frobenius" if plan.keeps_norm else "none",
        scale=plan.scale,
        layers=plan.layers,
        rows=rows,
        unmapped_targets=tuple(
            name for name in (plan.pairing.unmapped_targets if plan.pairing else ()) if name not in adapter.modules
        ),
        # A fit uses the whole adapter, so no source module is left out.
        unmapped_sources=(moved.unmapped or account.unmapped) if moved.fit is None else (),
        energy=sum(energies) if plan.queried is None else None,
        warnings=tuple(dict.fromkeys((*warnings_of(plan), *notes, *plan.mismatch_warnings, *found))),
        out_rank=options.out_rank if truncation is None else truncation.rule,
        choice=plan.reason,
        effect=effect,
        fit=moved.fit,
        curve=tuple(moved.curve),
        added=moved.added,
        wrote_prompts=moved.wrote_prompts,
        examples=pick_evenly(texts, _EXAMPLES) if moved.wrote_prompts else (),
        truncation=truncation,
        rank_before=max(_ranks(source).values(), default=None if plan.queried is None else plan.queried.rank),
        ranks=_ranks(adapter),
        tokens=_token_rows(moved.tokens or account.tokens, adapter),
        asked={} if plan.queried is None else plan.queried.settings(),
    )
    report = complete(report, plan.method)
    logs.record(report.figures)
    shown = texts or (() if plan.probes is None else tuple(plan.probes.texts))
    kept = moved.completions if moved.wrote_prompts else ()
    return TransferResult(adapter, report, described, shown, moved.chat_template, kept)


def _info(plan: Plan) -> AdapterInfo:
    """Describe the moved adapter."""
    before, target = plan.adapter.info, plan.target
    return AdapterInfo(
        name=f"{before.name}, moved",
        base_name=target.name,
        prefix=target.prefix,
        kind=before.kind if before.invocation else "LoRA",
        invocation=before.invocation_target,
    )


def _losses(info: AdapterInfo, *, same_weights: bool) -> Iterator[str]:
    """Yield a sentence for each part of the adapter that was read inexactly or does not move."""
    if info.lost:
        yield f"the adapter is {info.read_as}."
        if same_weights:
            again = ", as does what `jcrosslora export --keep-dora` writes" if info.kind == DORA.name else ""
            which = "the adapter's own file works on the target, and loses nothing"
            yield f"both bases have the same weights: {which}{again}."
    yield from (f"not moved: {sentence}" for sentence in info.ignored)


def _left_out(plan: Plan, account: Moved, adapter: Adapter) -> Iterator[str]:
    """Yield a sentence for each part that the maps moved and the method did not return."""
    held = Carried.EVERYTHING
    held &= held if adapter.tokens else ~Carried.TOKENS
    held &= held if adapter.experts else ~Carried.EXPERTS
    left = left_out(account.adapter, held, f"method {plan.method.name} left it out")
    yield from (f"not moved: {text}" for text in left)


def _token_rows(rows: tuple[TokenRow, ...], moved: Adapter) -> tuple[TokenRow, ...]:
    """Return a row for each change of embedding and head: first those of the maps, then the method's."""

    def accounts(row: TokenRow, update: TokenUpdate) -> bool:
        return row.kind == update.kind and not set(row.modules).isdisjoint(update.modules)

    # A row without moved tokens has no update.
    kept = [row for row in rows if not row.moved or any(accounts(row, one) for one in moved.tokens)]
    new = [one for one in moved.tokens if not any(accounts(row, one) for row in kept)]
    return *kept, *(TokenRow(one.modules, one.kind, len(one.ids), len(one.ids)) for one in new)


def _rows(rows: tuple[ModuleRow, ...], moved: Moved, adapter: Adapter, target: BaseModel) -> tuple[ModuleRow, ...]:
    """Return a report row for each module of the moved adapter, in the target's order."""
    norms = {name: none_if_nan(update_norm(factors)) for name, factors in adapter.modules.items()}
    if moved.fit is None:
        return tuple(structs.replace(row, norm_after=norms.get(row.target, 0.0)) for row in rows)
    # The share that the maps kept is undefined for a fitted update.
    known = {row.target: structs.replace(row, norm_after=0.0, kept=None) for row in rows}
    for name, norm in norms.items():
        row = known.get(name) or ModuleRow.fitted(name, target.modules[name].role)
        known[name] = structs.replace(row, norm_after=norm)
    order = {name: index for index, name in enumerate(target.modules)}
    return tuple(sorted(known.values(), key=lambda row: order.get(row.target, len(order))))


def _ranks(adapter: Adapter) -> dict[str, int]:
    """Return the rank of each module, and of each parameter of experts."""
    of_experts = {update.name: update.a.shape[1] for update in adapter.experts}
    return {name: factors.rank for name, factors in adapter.modules.items()} | of_experts


def _effect(plan: Plan, moved: Moved, adapter: Adapter, options: TransferOptions) -> tuple[Effect | None, list[str]]:
    """Measure the effect of the moved adapter if the options ask for it; return it with warnings.

    Raises:
        UsageError: the effect is requested "always", and there is no text to measure it on.
        CheckpointError: it is requested "always", and a base cannot be run.
    """
    warnings, runs_bases = list[str](), plan.method.runs_bases
    if (given := plan.given) is not None and plan.probes is None:
        text = "the text that was given" if given.path is None else f"the text of {Path(given.path).name}"
        warnings.append(f"{text} was not read: method {plan.method.name} asks for none")
    effect = None
    if plan.queried is None and options.checks_effect(runs_bases=runs_bases):
        begin(EFFECT)
        # A method that runs the bases has already shown that they can be run.
        if not runs_bases and (obstacle := why_not_run(plan.pair.source, plan.target)) is not None:
            raise CheckpointError(f"the effect cannot be measured: {obstacle}; leave out --effect always")
        try:
            with enough_memory("leave out the check with --effect never"):
                effect = _measured(plan, moved, adapter)
        # A finished transfer does not fail because of a check that the user did not request.
        except (UsageError, ShortMemoryError) as error:
            if options.effect == "always":
                raise
            warnings.append(f"the effect was not measured: {error}")
    if plan.adapter.tokens and (runs_bases or effect is not None):
        warnings.append(_WITHOUT_TOKENS)
    return effect, warnings


def _measured(plan: Plan, moved: Moved, adapter: Adapter) -> Effect | None:
    """Measure the effects of the moved adapter and of the original; None if there is no text.

    Texts that the source wrote with its adapter are preferred: an adapter that was trained on answers changes other
    texts little.
    """
    source, loaded = plan.pair.source, plan.loaded
    texts: Sequence[str] = () if plan.probes is None else plan.probes.texts
    written = [item.text for item in moved.completions]
    if written:
        texts = ()
    else:
        # The weights are dropped afterwards unless `loaded` keeps them.
        model = None if loaded is None else loaded.model(source, fast_dtype())
        written = adapter_texts(source, plan.adapter, seed=plan.seed, model=model)
    if not texts and not written:
        return None
    return check_effect((source, plan.adapter), (plan.target, adapter), texts, written=written, loaded=loaded)
