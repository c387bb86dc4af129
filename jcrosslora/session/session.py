"""The session of a source and a target: plans transfers between the two, and runs them."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from msgspec import structs

from jcrosslora.adapter import Adapter, find_adapter, fit_to_base, load_adapter
from jcrosslora.adapter.origin import mismatch_warnings
from jcrosslora.adapter.records import check_always_active, why_idle
from jcrosslora.adapter.save import check_holds, check_profile
from jcrosslora.checkpoint import BaseInfo, BaseModel, describe_base
from jcrosslora.decoder import LoadedBases, fast_dtype, loaded_within
from jcrosslora.decoder.loading import held_numbers
from jcrosslora.distill.sources import QueriedSource, ServedModel, TorchModel
from jcrosslora.errors import AdapterError, MethodError, UsageError
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.method import FINISH, Plan, no_weights
from jcrosslora.maps.other_changes import with_invocation
from jcrosslora.maps.planning import plan_between, plan_through, with_text
from jcrosslora.maps.shift import checked_adapter, map_together
from jcrosslora.maps.transport import Transport
from jcrosslora.methods import METHODS, Auto, Distill, FitFacts, Method, make_chosen
from jcrosslora.relation import MethodChoice, choose_method, parse_depth, without_fit
from jcrosslora.relation.method_selection import FITTED_VARIANT, with_fit
from jcrosslora.session.conclusion import conclude
from jcrosslora.session.estimate import Estimate, costs_of, estimate, place_bases
from jcrosslora.session.job import Job
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.session.timing import seconds_of
from jcrosslora.utils.cache import Cache
from jcrosslora.utils.cost import free_memory
from jcrosslora.utils.progress import Steps, begin, say, shows_progress, steps

QueriedModel = ServedModel | TorchModel
_QUERIED = "the source can only be queried, so an update is fitted to its predictions"


class Session:
    """Transfers from a source to a target: a single one, or many adapters that share an alignment.

    Results that several adapters of the pair share are computed once.

    Attributes:
        pair: both bases, with the facts that stages share; None if the source can only be queried.
        loaded: keeps the weights of both bases for what runs them; None loads them anew each time.
    """

    def __init__(self, source: BaseModel | QueriedModel, target: BaseModel, *, store: Cache | None = None) -> None:
        self._source, self._target, self._root = source, target, None if store is None else store.root
        self.pair = BasePair(source, target, store) if isinstance(source, BaseModel) else None
        self.loaded: LoadedBases | None = None
        self._shared: dict[Any, Any] = {}

    def transfer(self, job: Job) -> TransferResult:
        """Move one adapter."""
        plan = self.plan(job, self.load(job))
        for sentence in plan.mismatch_warnings if shows_progress() else ():
            say(f"warning: {sentence}")
        return self._run(plan, job)

    def estimate(self, job: Job) -> Estimate:
        """Estimate the transfer of the job's adapter; without one (None), of an adapter of all source modules.

        A served source is contacted, to check that it answers.
        """
        if self.pair is not None and job.adapter is None:
            plan = self._between(job, *self.resolve(job), sources=None)
        else:
            plan = self.plan(job, self.load(job))
        if isinstance(self._source, ServedModel):
            self._open(job)
        return estimate(plan, job.options)

    def load(self, job: Job) -> Adapter | None:
        """Load the adapter of a job; None if the source holds it and can only be queried."""
        if self.pair is None:
            self._opening(job)
            return None
        return load_adapter(job.adapter, self.pair.source, revision=job.revision, rank=job.rank, alpha=job.alpha)

    def resolve(self, job: Job, adapter: Adapter | None = None) -> tuple[Method, str | None]:
        """Return the method for an adapter (None: any adapter that the bases can run), and why `auto` chose it.

        The reason is None if the user named the method.

        Raises MethodError if there are labelled examples, which the method cannot use.
        """
        chosen, reason = job.method, None
        examples = job.probes is not None and bool(job.probes.examples)
        if isinstance(chosen, Auto) and self.pair is None:
            return make_chosen(Distill.name, chosen), _QUERIED
        if isinstance(chosen, Auto):
            choice = with_fit(self._choice) if examples else self._choice
            fits_on_copy = choice.method in FITTED_VARIANT.values()
            if adapter is not None and (why := _why_no_fit(adapter, job.options, fits_on_copy=fits_on_copy)):
                choice = without_fit(choice, why)
            chosen, reason = make_chosen(choice.method, chosen), choice.reason
        if examples and not chosen.uses_examples:
            able = ", ".join(name for name, one in METHODS.items() if one().uses_examples)
            msg = f"method {chosen.name} cannot use labelled examples, as it fits no update to answers: use {able}, "
            raise MethodError(msg + "or leave out --examples")
        return chosen, reason

    @cached_property
    def _choice(self) -> MethodChoice:
        assert self.pair is not None
        return choose_method(self.pair.source, self.pair.target, self.pair.structure)

    def plan(self, job: Job, adapter: Adapter | None, transport: Transport | None = None) -> Plan:
        """Check a job for every error that later stages could raise, and plan it; nothing is computed yet.

        Args:
            adapter: the loaded adapter of the job; None if the source can only be queried.
            transport: the maps, if they exist already.

        Raises:
            AdapterError: the adapter does nothing, or does not fit the source base.
            MethodError: the method cannot be used on these bases or with this adapter, or cannot use examples.
            OutputError: the profile cannot hold the adapter, or cannot be written for the target.
            PairingError: the modules cannot be paired as asked.
            UsageError: the profile is unknown, or the options do not fit the method.
        """
        if adapter is None:
            return self._plan_queried(job)
        assert self.pair is not None
        adapter, method, reason = self._checked(job, adapter)
        # Maps may come from the cache, and then no weights are read.
        found = mismatch_warnings(adapter, self.pair.source, weights=method.runs_bases)
        if reason is None and self.pair.source.store.files and self.pair.source.store.files == self._target.store.files:
            found += ("source and target are one and the same base: nothing has to be moved",)
        if transport is None:
            # An adapter of experts alone has no modules to align, but a fit may update all of the target's.
            plan = self._between(job, method, reason, sources=adapter.modules.keys() or None)
        else:
            plan = self._complete(plan_through(self.pair, method, transport), job, reason)
        return replace(plan, adapter=adapter, mismatch_warnings=found)

    def _checked(self, job: Job, adapter: Adapter) -> tuple[Adapter, Method, str | None]:
        """Return the part of an adapter that moves, the method, and why `auto` chose it. For errors see `plan`."""
        assert self.pair is not None
        options, profile, target = job.options, job.profile, self._target
        if (idle := why_idle(adapter)) is not None:
            raise AdapterError(idle)
        adapter = fit_to_base(adapter, self._source_info)  # before anything is read of the weights
        self.take_digests()
        adapter = with_invocation(adapter, self.pair.source, target)
        method, reason = self.resolve(job, adapter)
        check_profile(profile, target.family.name, (target.dims.heads, target.dims.kv_heads))
        check_holds(profile, adapter)
        if method.fits_update:
            why = f"and method {method.name} runs the source with it: name another method, such as cross-lora"
            check_always_active(adapter, why, MethodError)
        if options.effect == "always":
            check_always_active(adapter, "so its effect cannot be measured: leave out --effect always", MethodError)
        method.check()
        plan = Plan(method, target, adapter, self.pair, calibrate=options.calibrate, scale=options.scale)
        return checked_adapter(plan, profile), method, reason

    def _plan_queried(self, job: Job) -> Plan:
        """Plan a transfer from a source that can only be queried; for errors see `plan`."""
        options, target = job.options, self._target
        method, reason = self.resolve(job)
        method.check()
        if method.reads_source:
            raise no_weights(method)
        unfit = {"scale": options.scale != 1, "calibrate": options.calibrate not in (None, "none")}
        unfit["effect"] = options.effect == "always"
        for name in (name for name, given in unfit.items() if given):
            msg = f"{name} {getattr(options, name)} was asked for, which needs the adapter's weights, and the source "
            raise UsageError(msg + "is asked and not read: leave it out")
        check_profile(job.profile, target.family.name, (target.dims.heads, target.dims.kv_heads))
        return self._complete(Plan(method, target, Adapter({})), job, reason)

    def _between(self, job: Job, method: Method, reason: str | None, sources: Collection[str] | None) -> Plan:
        """Plan the alignment of the given source modules; None means all."""
        assert self.pair is not None
        method.check()
        depth = parse_depth(job.options.depth)
        plan = plan_between(self.pair, method, depth=depth, seed=job.options.seed, sources=sources)
        return self._complete(plan, job, reason)

    def _complete(self, plan: Plan, job: Job, reason: str | None) -> Plan:
        """Add the options that do not depend on the modules."""
        options = job.options
        return replace(
            plan,
            depth=plan.depth or options.depth,
            seed=options.seed,
            calibrate=options.calibrate,
            scale=options.scale,
            given=job.probes,
            probe_count=options.probe_count,
            reason=reason,
            shared=self._shared,
            states=None if self._root is None else self._root / "fits",
        )

    @cached_property
    def _source_info(self) -> BaseInfo:
        assert self.pair is not None
        return describe_base(self.pair.source, digest="")

    def take_digests(self) -> None:
        """Take the digests of both bases from the cache, so that their files are not read again."""
        if self.pair is not None and (store := self.pair.store) is not None:
            for base in self.pair:
                base.digest(store.digests)

    def ready(self, plan: Plan, job: Job) -> Plan:
        """Choose devices for the bases that run, and open a source that can only be queried."""
        if self.pair is not None:
            return replace(plan, loaded=self.loaded or self._bases(plan.method, job.options))
        source = self._open(job)
        # The check of the effect needs the weights of the source.
        placement = place_bases([self._target], plan.method, replace(job.options, effect="never"))
        placement.announce()
        loaded = LoadedBases(mesh=placement.mesh)
        return replace(plan, queried=source, adapter=Adapter({}, source.adapter), loaded=loaded)

    def map_together(self, plans: Sequence[Plan], alignment: Plan) -> None:
        """Move the adapters of several plans through one alignment, before each is finished."""
        if plans[0].method.map_method is not None:
            for plan, moved in zip(plans, map_together(plans, alignment), strict=True):
                plan.keep(moved)

    def finish(self, plan: Plan, job: Job) -> TransferResult:
        """Let the method move the adapter; truncate it, check the effect, and report."""
        if plan.is_mapped:
            begin(FINISH)
        moved = plan.method.move(plan)
        if plan.queried is not None:
            doubt, facts = plan.queried.check_same(), moved.fit or FitFacts()
            note = "; ".join(filter(None, (facts.note, f"the source was {plan.queried.how}")))
            warnings = (*moved.warnings, *([doubt] if doubt else []))
            moved = replace(moved, fit=structs.replace(facts, note=note), warnings=warnings)
        return conclude(plan, moved, job)

    def finish_aligned(self, job: Job, transport: Transport) -> TransferResult:
        """Move an adapter through existing maps."""
        return self._run(self.plan(job, self.load(job), transport), job)

    def _run(self, plan: Plan, job: Job) -> TransferResult:
        """Run a checked plan. Opening a queried source and writing texts can take minutes."""
        plan = self.ready(plan, job)
        with self.steps(plan, job.options):
            return self.finish(with_text(plan), job)

    def steps(self, plan: Plan, options: TransferOptions, *, timed: bool = True) -> AbstractContextManager[Steps]:
        """Show the numbered steps of a transfer while the block runs.

        `timed` estimates the seconds of each step first, which takes a while.
        """
        if not shows_progress():
            return nullcontext(Steps(None, {}))
        found = costs_of(plan, options)
        timed = timed and self.pair is not None and (options.effect == "always" or plan.method.runs_bases)
        seconds = seconds_of(found, plan.pair, plan.method) if timed else dict.fromkeys(found)
        return steps(seconds) if found else nullcontext(Steps(None, {}))

    def keep_bases(self, method: Method, options: TransferOptions) -> None:
        """Keep the weights of both bases for fits and checks of several adapters, as far as memory allows."""
        self.loaded = self.loaded or self._bases(method, options, keep=True)

    def _bases(self, method: Method, options: TransferOptions, *, keep: bool = False) -> LoadedBases | None:
        """Return the loader of the bases of a transfer; None if it does not run them. For errors see `place_bases`."""
        if self.pair is None or not (method.runs_bases or options.effect == "always"):
            return None
        bases = self.pair.source, self.pair.target
        placement = place_bases(bases, method, options)
        placement.announce()
        if placement.streamed:
            return LoadedBases((fast_dtype(),) if keep else (), placement.mesh, self.pair.source)
        if not keep:
            return LoadedBases(mesh=placement.mesh)
        numbers = [held_numbers(base, placement.devices) for base in bases]
        return loaded_within(free_memory(placement.devices), numbers, placement.mesh)

    def _open(self, job: Job) -> QueriedSource:
        """Open a source that can only be queried, which may take minutes."""
        return self._opening(job)()

    def _opening(self, job: Job) -> Callable[[], QueriedSource]:
        """Return the function that opens a source that can only be queried.

        Raises UsageError for an adapter where none is wanted, or none if one is.
        """
        model, adapter = self._source, job.adapter
        if isinstance(model, ServedModel):
            if adapter and adapter != model.model:
                msg = f"adapter {str(adapter)[:200]} was given with a served model, which has its own: leave it out, "
                raise UsageError(msg + "and name the served adapter with --source-model")
            from jcrosslora.distill.sources.served import ServedSource

            return partial(ServedSource.open, model, None if self._root is None else self._root / "answers")
        assert isinstance(model, TorchModel)
        if not isinstance(adapter, str | Path):
            msg = "a source on torch needs an adapter in files: give a folder of PEFT or a hub id"
            raise UsageError(msg)
        find_adapter(adapter, job.revision)
        from jcrosslora.distill.sources.torch import TorchSource

        return partial(TorchSource.open, model, adapter, revision=job.revision)


def out_of_memory_advice(method: Method | Auto, source: Any = None) -> str:
    """Return the advice for out-of-memory errors, "" if the method does not run the bases."""
    if isinstance(source, ServedModel | TorchModel):
        return "a shorter --answer-tokens"
    if isinstance(method, Method) and not method.runs_bases:
        return ""
    return "a method that looks at weights alone, such as cross-lora, which holds a group of modules at a time"


def _why_no_fit(adapter: Adapter, options: TransferOptions, *, fits_on_copy: bool) -> str | None:
    """Return why no update can be fitted to an adapter, or None.

    With `fits_on_copy` the fit only refines a copied update, which alone is used if the fit cannot handle the request.
    """
    if adapter.info.invocation is not None:
        return "no base can be run with an adapter that acts only after its invocation tokens"
    if fits_on_copy and adapter.tokens:
        return "no base can be run with the adapter's changes of the embedding and the output head"
    if fits_on_copy and (options.scale != 1 or options.calibrate == "frobenius"):
        return "a scale or a calibration was asked for, which have no part in a fit"
    return None
