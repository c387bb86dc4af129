"""Transfers from a source that can only be queried: without its weights nothing is aligned, and an update is fitted."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from msgspec import structs

from jcrosslora.adapter import Adapter, AdapterInfo, find_adapter
from jcrosslora.adapter.save import check_profile
from jcrosslora.checkpoint import BaseInfo, BaseModel, describe_base
from jcrosslora.decoder import LoadedBases
from jcrosslora.distill.sources import QueriedSource, ServedModel, TorchModel
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.maps.method import FINISH, Sizes
from jcrosslora.maps.shift import Shifted
from jcrosslora.maps.transport import AlignRecipe, Transport
from jcrosslora.methods import Auto, Distill, FitFacts, Method, Task, make_chosen
from jcrosslora.relation import Pairing
from jcrosslora.session.conclusion import Move, Request, conclude
from jcrosslora.session.estimate import Estimate, Placement, fitted_modules, place_bases
from jcrosslora.session.result import TransferResult
from jcrosslora.utils.cache import Cache
from jcrosslora.utils.progress import begin, steps

_CHOICE = "the source can only be queried, so an update is fitted to its predictions"

QueriedModel = ServedModel | TorchModel


class QueriedSession:
    """Transfers from a queried source to a base, with the interface of a `PairSession`."""

    def __init__(self, model: QueriedModel, target: BaseModel, *, store: Cache | None = None) -> None:
        self._model, self._target, self._root = model, target, None if store is None else store.root

    def transfer(self, request: Request) -> TransferResult:
        """Fit an update of the target to the adapted source's predictions."""
        opening = self._opening(request)
        move = self._check(request)
        source, target, probes = opening(), self._target, request.probes
        move = replace(move, queried=source.settings(), rank=source.rank)
        placement = self._placement(move)
        placement.announce()
        before = Adapter({}, source.adapter)
        task = Task(
            source=source,
            target=target,
            adapter=before,
            prompts=() if probes is None else probes.prompts or probes.texts,
            examples=() if probes is None else probes.examples,
            seed=request.options.seed,
            states=None if self._root is None else self._root / "fits",
            loaded=LoadedBases(mesh=placement.mesh),
        )
        with steps(self._steps(move)):
            begin(FINISH)
            update = move.method.move(task)
        doubt = source.check_same()
        facts = update.fit or FitFacts()
        note = "; ".join(filter(None, (facts.note, f"the source was {source.how}")))
        warnings = (*update.warnings, *([doubt] if doubt else []))
        update = replace(update, fit=structs.replace(facts, note=note), warnings=warnings)
        info = AdapterInfo(name=f"{source.adapter.name}, moved", base_name=target.name, prefix=target.prefix)
        unmapped = Shifted(Adapter({}, info), before, (), (), (), math.nan, "none", 1.0, ())
        return conclude(move, self._transport(source, request, move.method), unmapped, update, target)

    def estimate(self, request: Request) -> Estimate:
        """Estimate the memory of the target; the time of a queried source is unknown. Connects to a server."""
        opening = self._opening(request)
        move = self._check(request)
        if isinstance(self._model, ServedModel):
            opening()
        placed, method = self._placement(move), move.method
        rank, modules = getattr(method, "fit_rank", None), fitted_modules(method, self._target)
        seconds = self._steps(move)
        return Estimate(method, move.reason, modules, rank, seconds, placed.peak, placed, request.examples)

    def _steps(self, move: Move) -> dict[str, float | None]:
        """Return the steps of the method, of unknown seconds."""
        request = move.request
        return dict.fromkeys(move.method.cost(Sizes(self._target, request.texts, 0, 0, request.examples)))

    def _opening(self, request: Request) -> Callable[[], QueriedSource]:
        """Return the function that opens the source with its adapter, which may take minutes.

        Raises UsageError for an adapter where none is wanted, or none if one is.
        """
        model, adapter = self._model, request.adapter
        if isinstance(model, ServedModel):
            if adapter and adapter != model.model:
                msg = f"adapter {str(adapter)[:200]} was given with a served model, which has its own: leave it out, "
                raise UsageError(msg + "and name the served adapter with --source-model")
            from jcrosslora.distill.sources.served import ServedSource

            return partial(ServedSource.open, model, None if self._root is None else self._root / "answers")
        if not isinstance(adapter, str | Path):
            raise UsageError("a source on torch needs an adapter in files: give a folder of PEFT or a hub id")
        find_adapter(adapter, request.revision)
        from jcrosslora.distill.sources.torch import TorchSource

        return partial(TorchSource.open, model, adapter, revision=request.revision)

    def _check(self, request: Request) -> Move:
        """Check a request before the source is opened.

        Raises:
            MethodError: the method needs the source's weights.
            UsageError: an option needs the source or its adapter, or is out of range.
        """
        method, options, profile, target = request.method, request.options, request.profile, self._target
        chosen = make_chosen(Distill.name, method) if isinstance(method, Auto) else method
        if chosen.reads_source:
            msg = f"method {chosen.name} needs the weights of the source, which are not read where it is asked: use "
            raise MethodError(msg + "--method distill, or give the weights with --source")
        chosen.check()
        unfit = {"scale": options.scale != 1, "calibrate": options.calibrate not in (None, "none")}
        unfit["effect"] = options.effect == "always"
        for name in (name for name, given in unfit.items() if given):
            msg = f"{name} {getattr(options, name)} was asked for, which needs the adapter's weights, and the source "
            raise UsageError(msg + "is asked and not read: leave it out")
        check_profile(profile, target.family.name, (target.dims.heads, target.dims.kv_heads))
        return Move(request, chosen, _CHOICE if isinstance(method, Auto) else None)

    def _placement(self, move: Move) -> Placement:
        # The check of the effect needs the weights of the source.
        return place_bases([self._target], move.method, replace(move.request.options, effect="never"))

    def _transport(self, source: QueriedSource, request: Request, method: Method) -> Transport:
        """Return the record of a transfer without an alignment."""
        recipe = AlignRecipe(
            method=method.name,
            settings=method.settings(),
            depth=request.options.depth,
            seed=request.options.seed,
            signs="not needed",
            shared_tokens=0,
            probes="none" if request.probes is None else request.probes.describe(),
            prompts=None if request.probes is None else request.probes.path,
            examples=None if request.probes is None else request.probes.examples_path,
            example_count=request.examples,
        )
        described = BaseInfo(name=source.name, ref=source.ref, revision=None, digest="", family="not read", shapes={})
        layers = (None,) * self._target.dims.layers
        pairing = Pairing("none", layers, pairs=(), unmapped_targets=())
        return Transport((), method, recipe, described, describe_base(self._target), pairing)
