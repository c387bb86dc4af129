"""Transfers from a source that is asked and not read: no weights of it are there, so that a fit is the only way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jcrosslora.adapter import update_norm
from jcrosslora.adapter.profiles import Profile, check_profile
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.alignment.transport import AlignRecipe
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base_info import BaseInfo, describe_base
from jcrosslora.errors import HostError, MethodError, UsageError
from jcrosslora.logs import record
from jcrosslora.methods import Auto, Distill, Method, make_chosen
from jcrosslora.report.record import TransferReport, spread
from jcrosslora.session.estimate import Estimate
from jcrosslora.session.placement import Placement, place_bases
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.shifting.records import ModuleRow
from jcrosslora.shifting.truncate import READERS, span_rank, truncate_for_profile
from jcrosslora.sources.protocol import Source
from jcrosslora.utils.progress import steps

if TYPE_CHECKING:
    from jcrosslora.evidence.probes import Probes

_EXAMPLES = 10  # completions of a fit that the report shows
_CHOICE = "the source is asked and its weights are not read, so an update is fitted to what it predicts"
_STEPS = "write completions", "fit"


@dataclass(frozen=True, eq=False)
class AskedSource:
    """A source that is asked, with what reports say of it.

    Attributes:
        source: the source.
        adapter: what is known of its adapter.
        rank: of the adapter, None if it is not known.
        how: says how it was asked, the end of a sentence, once it was.
        settings: of a transfer that asks it again, by name; no addresses and no paths of this machine.
    """

    source: Source
    adapter: AdapterInfo
    rank: int | None
    how: Callable[[], str]
    settings: Mapping[str, Any]


def transfer_asked(
    asked: AskedSource,
    target: BaseModel,
    method: Method | Auto,
    options: TransferOptions,
    *,
    probes: Probes | None = None,
    profile: Profile = "peft",
    states: Path | None = None,
    progress: bool = False,
) -> TransferResult:
    """Fit an update of a target to a source that is asked.

    Args:
        asked: the source with its adapter.
        target: the base to update.
        method: distill, or auto.
        options: of the transfer.
        probes: the user's prompts, or None.
        profile: the intended file format of the result.
        states: folder for the states of long fits, or None.
        progress: whether to show progress.

    Raises:
        MethodError, UsageError, HostError: see `check_asked`.
        UsageError, MemoryError: see `place_bases`.
        JCrossLoRAError: see `distill_from`.
    """
    chosen, choice = check_asked(target, method, options, profile)
    from jcrosslora.decoder.loaded import LoadedBases
    from jcrosslora.fit.distill.run import distill_from

    given = () if probes is None else (probes.prompts or probes.texts)
    placement = _placed(target, chosen, options)
    placement.announce(show=progress)
    more = {"states": states, "progress": progress, "loaded": LoadedBases(mesh=placement.mesh)}
    with steps(dict.fromkeys(_STEPS), show=progress):
        found = distill_from(asked.source, target, prompts=given, settings=chosen, seed=options.seed, **more)
    texts = tuple(item.text for item in found.completions)
    info = AdapterInfo(name=f"{asked.adapter.name}, moved", base_name=target.name, prefix=target.prefix)
    moved = Adapter(
        {name: found.adapter.modules[name] for name in target.modules if name in found.adapter.modules}, info
    )
    moved, truncation, frozen = truncate_for_profile(moved, target, profile, options.out_rank)
    report = TransferReport(
        method=chosen,
        recipe=_recipe(chosen, options, probes),
        source=_described(asked.source),
        target=describe_base(target),
        adapter=asked.adapter,
        calibration="none",
        scale=1.0,
        layers=(None,) * target.dims.layers,
        rows=tuple(
            ModuleRow.fitted(name, target.modules[name].role, update_norm(factors))
            for name, factors in moved.modules.items()
        ),
        unmapped_targets=(),
        unmapped_sources=(),
        energy=math.nan,
        warnings=() if frozen is None else (READERS,),
        out_rank=options.out_rank if truncation is None else truncation.rule,
        choice=choice,
        fitted=f"{found.sentence}; the source was {asked.how()}",
        curve=tuple((look.completions, look.divergence) for look in found.looks),
        wrote_prompts=not given,
        examples=() if given else spread(texts, _EXAMPLES),
        truncation=truncation,
        rank_before=asked.rank,
        ranks={name: factors.rank for name, factors in moved.modules.items()},
        asked=asked.settings,
    )
    record(report.figures)
    kept = () if given else found.completions
    return TransferResult(moved, report, texts, frozen, found.chat_template, kept)


def check_asked(
    target: BaseModel, method: Method | Auto, options: TransferOptions, profile: Profile
) -> tuple[Distill, str | None]:
    """Check a transfer before its source is opened, which may take minutes.

    Returns:
        The method, and why it was chosen; None where the user named it.

    Raises:
        MethodError: the method needs the source's weights.
        UsageError: an option needs the source or its adapter, or is out of range.
        HostError: several processes work together.
    """
    if jax.process_count() > 1:
        msg = f"{jax.process_count()} processes work together, and a source that is asked is asked by one: start one"
        raise HostError(msg)
    chosen = make_chosen(Distill.name, method) if isinstance(method, Auto) else method
    if not isinstance(chosen, Distill) or _needs_weights(type(chosen)):
        msg = f"method {chosen.name} needs the weights of the source, which are not read where it is asked: use "
        raise MethodError(msg + "--method distill, or give the weights with --source")
    chosen.check()
    unfit = {"scale": options.scale != 1, "calibrate": options.calibrate not in (None, "none")}
    unfit["effect"] = options.effect == "always"
    for name, given in unfit.items():
        if given:
            msg = (
                f"{name} {getattr(options, name)} was asked for, which needs the adapter's weights, and the source is "
            )
            raise UsageError(msg + "asked and not read: leave it out")
    span_rank(profile, options.out_rank)
    check_profile(profile, target.family.name, (target.dims.heads, target.dims.kv_heads))
    return chosen, _CHOICE if isinstance(method, Auto) else None


def estimate_asked(target: BaseModel, method: Distill, options: TransferOptions, reason: str | None) -> Estimate:
    """Estimate what is known without asking: the memory of the target. How long a source takes shows when it is asked.

    Args:
        target: the base to update.
        method: of the fit.
        options: of the transfer.
        reason: why it was chosen, or None.

    Raises:
        UsageError, MemoryError: see `place_bases`.
    """
    placed = _placed(target, method, options)
    seconds: dict[str, float | None] = dict.fromkeys(_STEPS)
    return Estimate(method, reason, len(target.modules), method.fit_rank, seconds, placed.weights, placed)


def _placed(target: BaseModel, method: Distill, options: TransferOptions) -> Placement:
    """Place the target alone, whose effect is not checked."""
    return place_bases([target], method, dataclasses.replace(options, effect="never"))


def _needs_weights(method: type[Distill]) -> bool:
    """Whether a method derived from the fit moves the update by maps, or has a last stage of its own."""
    return method.maps is not Distill.maps or method.finalize is not Distill.finalize


def _described(source: Source) -> BaseInfo:
    return BaseInfo(name=source.name, ref=source.ref, revision=None, digest="", family="not read", shapes={})


def _recipe(method: Distill, options: TransferOptions, probes: Probes | None) -> AlignRecipe:
    return AlignRecipe(
        method=method.name,
        settings=method.settings(),
        depth=options.depth,
        seed=options.seed,
        signs="not needed",
        shared_tokens=0,
        probes="none" if probes is None else probes.describe(),
        probe_text=None if probes is None else probes.path,
    )
