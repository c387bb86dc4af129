"""The session of a pair of bases: keeps what is known of the pair, and moves adapters between the two."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from jcrosslora.adapter import Adapter, Carried, fit_to_base, for_profile, load_adapter
from jcrosslora.adapter.origin import doubts
from jcrosslora.adapter.records import check_always_active, why_idle
from jcrosslora.adapter.save import check_holds, check_profile
from jcrosslora.checkpoint import BaseInfo, BaseModel, describe_base
from jcrosslora.decoder import LoadedBases, fast_dtype, loaded_within
from jcrosslora.decoder.loading import held_numbers
from jcrosslora.distill.sources import ServedModel, TorchModel
from jcrosslora.errors import AdapterError, MethodError
from jcrosslora.evaluate.effect import Effect
from jcrosslora.evaluate.probes import written_probes
from jcrosslora.maps.activations import batch_probes
from jcrosslora.maps.align import align_groups
from jcrosslora.maps.base_pair import BasePair
from jcrosslora.maps.evidence import USED_BY_MOVE, EvidenceKind
from jcrosslora.maps.method import FINISH
from jcrosslora.maps.other_changes import with_invocation
from jcrosslora.maps.plan import plan_alignment, with_text
from jcrosslora.maps.shift import Shifted, Shifter, add_to_all
from jcrosslora.maps.task import AlignmentTask
from jcrosslora.maps.transport import Transport, TransportGroup
from jcrosslora.methods import METHODS, Auto, Method, Task, make_chosen
from jcrosslora.relation import Choice, choose_method, parse_depth, without_fit
from jcrosslora.relation.method_selection import FITTED_VARIANT, with_fit
from jcrosslora.session.conclusion import Move, Request, conclude, measure_effect
from jcrosslora.session.estimate import Estimate, costs_of, estimate, place_bases
from jcrosslora.session.result import TransferResult
from jcrosslora.session.settings import TransferOptions
from jcrosslora.session.timing import seconds_of
from jcrosslora.utils.cache import Cache
from jcrosslora.utils.cost import free_memory
from jcrosslora.utils.progress import Steps, begin, say, shows_progress, steps

_WITHOUT_TOKENS = "where the bases were run, it was without the changes of the embedding and the output head"


@dataclass(frozen=True, eq=False, kw_only=True)
class PairMove(Move):
    """A checked request between two bases; `shifter` collects the shifted updates."""

    shifter: Shifter


class PairSession:
    """Transfers from one base to another: a single one, or many adapters that share an alignment.

    The stages of a transfer are `check`, `plan`, `collect_text`, `align_and_shift` and `finish`. Results that several
    adapters of the pair share are computed once.

    Attributes:
        pair: the two bases, with the facts that stages share.
        loaded: keeps the weights of both bases for what runs them; None loads them anew each time.
    """

    def __init__(self, source: BaseModel, target: BaseModel, *, store: Cache | None = None) -> None:
        self.pair = BasePair(source, target, store)
        self.loaded: LoadedBases | None = None
        self._shared: dict[Any, Any] = {}

    def transfer(self, request: Request) -> TransferResult:
        """Move one adapter."""
        move = self.check(request, self.load(request))
        task = self.plan(move.method, request.options, move.shifter.adapter.modules.keys())
        for sentence in move.doubts if shows_progress() else ():
            say(f"warning: {sentence}")
        # After everything has been checked: writing texts takes a minute.
        with self.steps(task, request):
            task = self.collect_text(task, request)
            return self.finish(move, task, self.align_and_shift([move], task))

    def estimate(self, request: Request) -> Estimate:
        """Estimate the transfer of an adapter; None is one that has all modules of the source."""
        if request.adapter is None:
            (method, reason), sources, warnings = self.resolve(request), None, ()
        else:
            move = self.check(request, self.load(request))
            method, reason, warnings = move.method, move.reason, move.doubts
            sources = move.shifter.adapter.modules.keys()
        return estimate(self.plan(method, request.options, sources), request, reason, warnings)

    def load(self, request: Request) -> Adapter:
        """Load the adapter of a request."""
        reading = {"revision": request.revision, "rank": request.rank, "alpha": request.alpha}
        return load_adapter(request.adapter, self.pair.source, **reading)

    def resolve(self, request: Request, adapter: Adapter | None = None) -> tuple[Method, str | None]:
        """Return the method for an adapter, or for any that can be run (None), and the reason if `auto` chose it.

        Raises MethodError if there are labelled examples, which the method cannot use.
        """
        chosen, reason = request.method, None
        if isinstance(chosen, Auto):
            choice = with_fit(self._choice) if request.examples else self._choice
            fits_on_copy = choice.method in FITTED_VARIANT.values()
            if adapter is not None and (why := _why_no_fit(adapter, request.options, fits_on_copy=fits_on_copy)):
                choice = without_fit(choice, why)
            chosen, reason = make_chosen(choice.method, chosen), choice.reason
        if request.examples and not chosen.uses_examples:
            able = ", ".join(name for name, one in METHODS.items() if one().uses_examples)
            msg = f"method {chosen.name} cannot use labelled examples, as it fits no update to answers: use {able}, "
            raise MethodError(msg + "or leave out --examples")
        return chosen, reason

    @cached_property
    def _choice(self) -> Choice:
        return choose_method(self.pair.source, self.pair.target, self.pair.structure)

    def check(self, request: Request, adapter: Adapter) -> PairMove:
        """Check a request, whose adapter is loaded, for every error that later stages could raise.

        Raises:
            AdapterError: the adapter does nothing, or does not fit the source base.
            MethodError: the method would run an adapter that waits for its invocation tokens, or cannot use examples.
            OutputError: the profile cannot hold the adapter, or cannot be written for the target.
            UsageError: the profile is unknown, or the options do not fit the method.
        """
        if (idle := why_idle(adapter)) is not None:
            raise AdapterError(idle)
        adapter = fit_to_base(adapter, self._source_info)  # before anything is read of the weights
        self.take_digests()
        adapter = with_invocation(adapter, self.pair.source, self.pair.target)
        chosen, reason = self.resolve(request, adapter)
        options, profile, target = request.options, request.profile, self.pair.target
        check_profile(profile, target.family.name, (target.dims.heads, target.dims.kv_heads))
        check_holds(profile, adapter)
        if chosen.fits_update:
            why = f"and method {chosen.name} runs the source with it: name another method, such as cross-lora"
            check_always_active(adapter, why, MethodError)
        if options.effect == "always":
            check_always_active(adapter, "so its effect cannot be measured: leave out --effect always", MethodError)
        if Carried.TOKENS in chosen.carries:
            adapter = for_profile(adapter, profile)
        shifter = Shifter(adapter, self._source_info, chosen, calibrate=options.calibrate, scale=options.scale)
        # Maps may come from the cache, and then no weights are read.
        found = doubts(adapter, self.pair.source, weights=chosen.runs_bases)
        if reason is None and self.pair.source.store.files and self.pair.source.store.files == target.store.files:
            found += ("source and target are one and the same base: nothing has to be moved",)
        return PairMove(request, chosen, reason, doubts=found, shifter=shifter)

    @cached_property
    def _source_info(self) -> BaseInfo:
        return describe_base(self.pair.source, digest="")

    def take_digests(self) -> None:
        """Take the digests of both bases that the cache of any process remembers, so that files are not read again."""
        if (store := self.pair.store) is not None:
            for base in self.pair:
                base.digest(store.digests)

    def plan(self, method: Method, options: TransferOptions, sources: Collection[str] | None) -> AlignmentTask:
        """Plan the alignment of some source modules, or of all, and check it; nothing is computed yet."""
        method.check()
        # An adapter of experts alone has no modules to align, but a fit may update all of the target's.
        depth, sources = parse_depth(options.depth), sources or None
        return plan_alignment(self.pair, method, depth=depth, seed=options.seed, sources=sources)

    def collect_text(self, task: AlignmentTask, request: Request) -> AlignmentTask:
        """Return the task with the text that it needs: the user's, or text that the source writes."""
        if not task.method.runs_bases:
            return task
        probes, seed, reads = request.probes, request.options.seed, EvidenceKind.PROBE_TEXTS in task.method.requires
        # Completions are generated later, with the adapter.
        if probes is None and (task.reads_probes or reads):
            probes = written_probes(self.pair.source, request.options.probe_count, seed=seed)
        task = with_text(task, probes)
        if reads and not task.batches:
            probes, batches = batch_probes(self.pair, probes, seed=seed)
            task = replace(task, probes=probes, batches=tuple(batches))
        return task

    def align_and_shift(
        self, moves: Sequence[PairMove], task: AlignmentTask, groups: Iterable[TransportGroup] | None = None
    ) -> Transport:
        """Align the modules group by group and shift all adapters through each group.

        Args:
            moves: adapters that share the alignment.
            task: the alignment, with its text.
            groups: groups that are aligned already; None aligns them.

        Returns:
            The transport without its groups, which are dropped one by one.
        """
        kernels: list[str] = []
        for group in align_groups(task) if groups is None else groups:
            add_to_all([move.shifter for move in moves], group)
            kernels += group.kernels
        return task.transport((), kernels)

    def finish(self, move: PairMove, task: AlignmentTask, transport: Transport) -> TransferResult:
        """Run what follows the maps: the method's own stage, truncation, and the check of the effect."""
        shifted = move.shifter.finish(transport, self.pair)
        begin(FINISH)
        own = self._task(shifted, task, move)
        update, probes = move.method.move(own), () if task.probes is None else task.probes.texts

        def check(moved: Adapter) -> tuple[Effect | None, tuple[str, ...]]:
            effect, warnings = measure_effect(own, moved, move, probes, [item.text for item in update.completions])
            if shifted.original.tokens and (move.method.runs_bases or effect is not None):
                warnings += (_WITHOUT_TOKENS,)
            if (given := move.request.probes) is not None and task.probes is None:
                text = "the text that was given" if given.path is None else f"the text of {Path(given.path).name}"
                warnings = (f"{text} was not read: method {move.method.name} asks for none", *warnings)
            return effect, (*move.doubts, *warnings)

        result = conclude(move, transport, shifted, update, self.pair.target, check=check)
        return result if result.texts else replace(result, texts=tuple(probes))

    def finish_aligned(self, move: PairMove, transport: Transport) -> TransferResult:
        """Shift an adapter through an existing transport with its groups, and finish it."""
        task = AlignmentTask(
            pair=self.pair,
            method=transport.method,
            depth=transport.recipe.depth,
            seed=move.request.options.seed,
            sources=None,
            pairing=transport.pairing,
            rank=transport.recipe.settings.get("svd_rank", 0),
        )
        with self.steps(task, move.request, aligned=True):
            if move.method.requires & USED_BY_MOVE:
                task = self.collect_text(task, move.request)
            for group in transport.groups:
                add_to_all([move.shifter], group)
            return self.finish(move, task, transport)

    def steps(
        self, task: AlignmentTask, request: Request, *, aligned: bool = False, timed: bool = True
    ) -> AbstractContextManager[Steps]:
        """Number the steps of a transfer on the display while the block runs.

        With `aligned` the maps are there already; without `timed` the seconds of the steps are not estimated, which
        takes a while.
        """
        if not shows_progress():
            return nullcontext(Steps(None, {}))
        runs_bases = request.options.effect == "always" or task.method.runs_bases
        found = costs_of(task, request, aligned=aligned)
        seconds = seconds_of(found, task.pair, task.method) if timed and runs_bases else dict.fromkeys(found)
        return steps(seconds) if found else nullcontext(Steps(None, {}))

    def keep_bases(self, method: Method, options: TransferOptions) -> None:
        """Keep the weights of both bases for fits and checks of several adapters, as far as memory allows."""
        self.loaded = self.loaded or self._bases(method, options, keep=True)

    def _bases(self, method: Method, options: TransferOptions, *, keep: bool = False) -> LoadedBases | None:
        """Return the loader of the bases of a transfer; None if it does not run them. For errors see `place_bases`."""
        if not (method.runs_bases or options.effect == "always"):
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

    def _task(self, shifted: Shifted, task: AlignmentTask, move: PairMove) -> Task:
        """Return the method's task: the adapter after the maps, with the prompts and the loaded bases."""
        given = task.probes if task.probes is not None and task.probes.seed is None else None
        return Task(
            source=self.pair.source,
            target=self.pair.target,
            adapter=shifted.original,
            mapped=None if move.method.map_method is None else shifted.adapter,
            prompts=() if given is None else given.prompts or given.texts,
            examples=() if given is None else given.examples,
            batches=task.batches,
            rank=task.rank,
            shared=self._shared,
            seed=move.request.options.seed,
            states=None if self.pair.store is None else self.pair.store.root / "fits",
            loaded=self.loaded or self._bases(move.method, move.request.options),
        )


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
