"""Transfers from a source that can only be queried. Its weights are not available, so only fits apply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jcrosslora.adapter.lora_xs import span_rank
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.adapter.save import Profile, check_profile
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base_info import BaseInfo, describe_base
from jcrosslora.distill.sources.protocol import Source
from jcrosslora.errors import HostError, MethodError, UsageError
from jcrosslora.maps.alignment.transport import AlignRecipe, Transport
from jcrosslora.maps.shifting.shift import Shifted
from jcrosslora.methods import Auto, Distill, Method, Task, make_chosen
from jcrosslora.relation.pairing import Pairing
from jcrosslora.session.conclusion import Request, conclude
from jcrosslora.session.estimate import Estimate, fitted_modules
from jcrosslora.session.placement import Placement, place_bases
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.utils.progress import steps

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import Probes

_CHOICE = "the source is asked and its weights are not read, so an update is fitted to what it predicts"
_STEPS = "write completions", "fit"


@dataclass(frozen=True, eq=False)
class AskedSource:
    """A source that can only be queried, with what reports say of it.

    Attributes:
        source: the source.
        adapter: what is known of its adapter.
        rank: of the adapter, None if it is not known.
        how: says how it was queried, the end of a sentence, once it was.
        settings: of a transfer that queries it again, by name; no addresses and no paths of this machine.
    """

    source: Source
    adapter: AdapterInfo
    rank: int | None
    how: Callable[[], str]
    settings: Mapping[str, Any]


def transfer_asked(
    asked: AskedSource,
    target: BaseModel,
    request: Request,
    *,
    probes: Probes | None = None,
    states: Path | None = None,
) -> TransferResult:
    """Fit an update of a target to a source that can only be queried.

    Args:
        asked: the source with its adapter.
        target: the base to update.
        request: from `check_asked`.
        probes: the user's prompts, or None.
        states: folder for the states of long fits, or None.

    Raises:
        UsageError, MemoryError: see `place_bases`.
        JCrossLoRAError: see `distill`.
    """
    from jcrosslora.decoder.loaded import LoadedBases

    placement = _placed(target, request.method, request.options)
    placement.announce()
    before = Adapter({}, asked.adapter)
    task = Task(
        source=asked.source,
        target=target,
        adapter=before,
        prompts=() if probes is None else (probes.prompts or probes.texts),
        seed=request.options.seed,
        states=states,
        loaded=LoadedBases(mesh=placement.mesh),
    )
    with steps(dict.fromkeys(_STEPS)):
        update = request.method.move(task)
    update = dataclasses.replace(update, fitted=f"{update.fitted}; the source was {asked.how()}")
    request = dataclasses.replace(request, queried=asked.settings, rank=asked.rank)
    info = AdapterInfo(name=f"{asked.adapter.name}, moved", base_name=target.name, prefix=target.prefix)
    unmapped = Shifted(Adapter({}, info), before, (), (), (), math.nan, "none", 1.0, ())
    return conclude(request, _transport(asked.source, target, request, probes), unmapped, update, target)


def check_asked(
    target: BaseModel, method: Method | Auto, options: TransferOptions, profile: Profile = "peft"
) -> Request:
    """Check a transfer before its source is opened, which may take minutes.

    Args:
        target: the base to update.
        method: a fit that starts from nothing, or auto.
        options: of the transfer.
        profile: the intended file format of the result.

    Raises:
        MethodError: the method needs the source's weights.
        UsageError: an option needs the source or its adapter, or is out of range.
        HostError: several processes work together.
    """
    if jax.process_count() > 1:
        msg = f"{jax.process_count()} processes work together, and a source that is asked is asked by one: start one"
        raise HostError(msg)
    chosen = make_chosen(Distill.name, method) if isinstance(method, Auto) else method
    if not isinstance(chosen, Distill) or chosen.start is not None:
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
    return Request(chosen, _CHOICE if isinstance(method, Auto) else None, options, profile)


def estimate_asked(target: BaseModel, request: Request) -> Estimate:
    """Estimate what is known without asking: the memory of the target. How long a source takes shows when it is asked.

    Args:
        target: the base to update.
        request: from `check_asked`.

    Raises:
        UsageError, MemoryError: see `place_bases`.
    """
    method = request.method
    assert isinstance(method, Distill)
    placed = _placed(target, method, request.options)
    seconds: dict[str, float | None] = dict.fromkeys(_STEPS)
    modules, memory = fitted_modules(method, target), placed.weights + placed.beside
    return Estimate(method, request.reason, modules, method.fit_rank, seconds, memory, placed)


def _placed(target: BaseModel, method: Method, options: TransferOptions) -> Placement:
    """Place the target alone, whose effect is not checked."""
    return place_bases([target], method, dataclasses.replace(options, effect="never"))


def _transport(source: Source, target: BaseModel, request: Request, probes: Probes | None) -> Transport:
    """Return the record of an alignment that there is none of."""
    recipe = AlignRecipe(
        method=request.method.name,
        settings=request.method.settings(),
        depth=request.options.depth,
        seed=request.options.seed,
        signs="not needed",
        shared_tokens=0,
        probes="none" if probes is None else probes.describe(),
        probe_text=None if probes is None else probes.path,
    )
    described = BaseInfo(name=source.name, ref=source.ref, revision=None, digest="", family="not read", shapes={})
    layers = (None,) * target.dims.layers
    pairing = Pairing("none", layers, pairs=(), unmapped_targets=(), unused=())
    return Transport((), request.method, recipe, described, describe_base(target), pairing)
