"""Transfers from a source that can only be queried: without its weights nothing is aligned, and an update is fitted."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jcrosslora.adapter import Adapter, AdapterInfo
from jcrosslora.adapter.folder import find_adapter
from jcrosslora.adapter.lora_xs import span_rank
from jcrosslora.adapter.save import Profile, check_profile
from jcrosslora.cache import Cache
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import BaseInfo, describe_base
from jcrosslora.distill.sources import QueriedSource, ServedModel, TorchModel
from jcrosslora.distributed import hosts
from jcrosslora.errors import HostError, MethodError, UsageError
from jcrosslora.maps.shift import Shifted
from jcrosslora.maps.transport import AlignRecipe, Transport
from jcrosslora.methods import Auto, Distill, Method, Task, make_chosen
from jcrosslora.relation.pairing import Pairing
from jcrosslora.session.conclusion import Request, conclude
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions, TransferSettings
from jcrosslora.utils.progress import steps

if TYPE_CHECKING:
    from jcrosslora.evaluate.probes import Probes
    from jcrosslora.session.estimate import Estimate
    from jcrosslora.session.timing import Stopwatch

_CHOICE = "the source is asked and its weights are not read, so an update is fitted to what it predicts"
_STEPS = "write completions", "fit"

QueriedModel = ServedModel | TorchModel


class QueriedSession:
    """Transfers from a queried source to a base; the methods are those of `PairSession`."""

    def __init__(self, model: QueriedModel, target: BaseModel, *, store: Cache | None = None) -> None:
        self._model, self._target, self._store = model, target, store

    def load(self, adapter: Any, *, revision: str | None = None, rank: int | None = None) -> Any:
        """Return what opens the source with its adapter. That may take minutes, so a request is checked before.

        Args:
            adapter: a folder of PEFT or a hub id for torch; None for a served model, which has its own.
            revision: of the adapter's hub id.
            rank: without effect, as the adapter is not read.

        Raises:
            UsageError: an adapter where none is wanted, or none where one is.
        """
        del rank
        model = self._model
        if isinstance(model, ServedModel):
            if adapter and adapter != model.model:
                msg = f"adapter {str(adapter)[:200]} was given beside a served model, which has its own: leave it out, "
                raise UsageError(msg + "and name the served adapter with --source-model")
            from jcrosslora.distill.sources.served import ServedSource

            return partial(ServedSource.open, model, None if self._store is None else self._store.root / "answers")
        if not isinstance(adapter, str | Path):
            msg = "a source on torch needs an adapter in files: give a folder of PEFT or a hub id"
            raise UsageError(msg)
        find_adapter(adapter, revision)
        from jcrosslora.distill.sources.torch import TorchSource

        return partial(TorchSource.open, model, adapter, revision=revision)

    def transfer(
        self,
        opening: Any,
        method: Method | Auto,
        options: TransferOptions,
        *,
        probes: Probes | None = None,
        profile: Profile = "peft",
    ) -> TransferResult:
        """Fit an update of the target to the source that `opening` (from `load`) opens, see `PairSession.transfer`."""
        from jcrosslora.decoder import LoadedBases
        from jcrosslora.session.estimate import place_bases

        request = self._check(method, options, profile)
        source: QueriedSource = opening()
        target = self._target
        request = dataclasses.replace(request, queried=source.settings(), rank=source.rank)
        placement = place_bases([target], request.method, _unchecked(options))
        placement.announce()
        before = Adapter({}, source.adapter)
        task = Task(
            source=source,
            target=target,
            adapter=before,
            prompts=() if probes is None else (probes.prompts or probes.texts),
            seed=options.seed,
            states=None if self._store is None else self._store.root / "fits",
            loaded=LoadedBases(mesh=placement.mesh),
        )
        with steps(dict.fromkeys(_STEPS)):
            update = request.method.move(task)
        update = dataclasses.replace(update, fitted=f"{update.fitted}; the source was {source.how}")
        info = AdapterInfo(name=f"{source.adapter.name}, moved", base_name=target.name, prefix=target.prefix)
        unmapped = Shifted(Adapter({}, info), before, (), (), (), math.nan, "none", 1.0, ())
        return conclude(request, self._transport(source, request, probes), unmapped, update, target)

    def estimate(
        self,
        opening: Any,
        method: Method | Auto,
        settings: TransferSettings,
        prompts: int = 0,
        stopwatch: Stopwatch | None = None,
    ) -> Estimate:
        """Estimate the memory of the target; how long a source takes shows when it is queried. A server is reached."""
        del prompts, stopwatch
        from jcrosslora.session.estimate import Estimate, fitted_modules, place_bases

        request = self._check(method, settings, settings.profile)
        if opening is not None and isinstance(self._model, ServedModel):
            opening()
        chosen = request.method
        assert isinstance(chosen, Distill)
        placed = place_bases([self._target], chosen, _unchecked(settings))
        seconds: dict[str, float | None] = dict.fromkeys(_STEPS)
        modules, memory = fitted_modules(chosen, self._target), placed.weights + placed.beside
        return Estimate(chosen, request.reason, modules, chosen.fit_rank, seconds, memory, placed)

    def _check(self, method: Method | Auto, options: TransferOptions, profile: Profile) -> Request:
        """Check a request before the source is opened.

        Raises:
            MethodError: the method needs the source's weights.
            UsageError: an option needs the source or its adapter, or is out of range.
            HostError: several processes work together.
        """
        if hosts.count() > 1:
            msg = f"{hosts.count()} processes work together, and a source that is asked is asked by one: start one"
            raise HostError(msg)
        chosen = make_chosen(Distill.name, method) if isinstance(method, Auto) else method
        if not isinstance(chosen, Distill) or chosen.start is not None:
            msg = f"method {chosen.name} needs the weights of the source, which are not read where it is asked: use "
            raise MethodError(msg + "--method distill, or give the weights with --source")
        chosen.check()
        unfit = {"scale": options.scale != 1, "calibrate": options.calibrate not in (None, "none")}
        unfit["effect"] = options.effect == "always"
        for name in (name for name, given in unfit.items() if given):
            msg = f"{name} {getattr(options, name)} was asked for, which needs the adapter's weights, and the source "
            raise UsageError(msg + "is asked and not read: leave it out")
        span_rank(profile, options.out_rank)
        target = self._target
        check_profile(profile, target.family.name, (target.dims.heads, target.dims.kv_heads))
        return Request(chosen, _CHOICE if isinstance(method, Auto) else None, options, profile)

    def _transport(self, source: QueriedSource, request: Request, probes: Probes | None) -> Transport:
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
        layers = (None,) * self._target.dims.layers
        pairing = Pairing("none", layers, pairs=(), unmapped_targets=(), unused=())
        return Transport((), request.method, recipe, described, describe_base(self._target), pairing)


def _unchecked(options: TransferOptions) -> TransferOptions:
    """Return the options without a check of the effect, which needs the weights of the source."""
    return dataclasses.replace(options, effect="never")
