"""Estimates before a transfer: seconds of each step, memory, and the devices that share the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jcrosslora.checkpoint import BaseModel, roles_named
from jcrosslora.decoder import fast_dtype
from jcrosslora.decoder.loading import held_numbers, mesh_of, streamed_numbers
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.effect import effect_cost
from jcrosslora.evaluate.probes import probes_cost
from jcrosslora.maps.align import ALIGN
from jcrosslora.maps.evidence import EvidenceKind
from jcrosslora.maps.method import Plan
from jcrosslora.maps.providers import evidence_cost
from jcrosslora.methods import Method
from jcrosslora.relation.pairing import Pair
from jcrosslora.session.conclusion import EFFECT
from jcrosslora.session.settings import Divide, TransferOptions
from jcrosslora.session.timing import seconds_of
from jcrosslora.utils.cost import Cost, check_host, free_memory
from jcrosslora.utils.progress import duration, say, shows_progress

_SHARED = ("write", ALIGN, "interpolate")  # made once for all adapters
# Bytes of a process that runs bases on a CPU (tokenizers, compiled programs, freed memory that is not returned), and of
# states and logits in a check. Moves from 1.5B to 0.5B parameters took up to 1.6 and 2.1 GB more than the counts.
PROCESS, _COMPARED = 1_600_000_000, 500_000_000
_CHECKED = 4  # bytes of a number in the check of the effect, which holds one base at a time


@dataclass(frozen=True)
class Estimate:
    """Time and memory of an alignment and of the transfer of one adapter through it.

    Attributes:
        reason: why "auto" chose the method; None if the user named it.
        modules: number of aligned or fitted modules.
        rank: rank of the truncated SVDs behind the maps, or the largest rank of a fit; None for other methods.
        steps: seconds of each step, in order; None if they are not known.
        memory: bytes on a device. If the bases run: their weights and what a fit needs. Otherwise: the weights, factors
            and maps of the largest group.
        examples: number of labelled examples.
        placement: devices of the weights in a fit and in the check of the effect; None if no base runs.
        warnings: signs that the adapter was not trained on this source, one sentence each.
    """

    method: Method
    reason: str | None
    modules: int
    rank: int | None
    steps: dict[str, float | None]
    memory: int
    placement: Placement | None = None
    examples: int = 0
    warnings: tuple[str, ...] = ()

    def seconds(self, adapters: int = 1) -> float:
        """Sum the known steps, for a number of adapters that share the alignment."""
        return sum((value or 0) * (1 if name in _SHARED else adapters) for name, value in self.steps.items())

    def record(self) -> dict[str, Any]:
        """Return the figures for one adapter as a JSON value."""
        return {
            "method": self.method.name,
            "why": self.reason,
            "modules": self.modules,
            "rank": self.rank,
            "examples": self.examples,
            "steps": self.steps,
            "seconds": self.seconds(),
            "memory_bytes": self.memory,
            "placement": None if self.placement is None else self.placement.record(),
            "warnings": list(self.warnings),
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield name and text of each figure for one adapter."""
        yield "method", self.method.name + (f": {self.reason}" if self.reason else "")
        yield "modules", str(self.modules)
        if self.rank is not None:
            yield "rank", f"up to {self.rank}"
        if self.examples:
            yield "labels", f"{self.examples:,} examples of yours, taught as they are"
        parts = ((name, "not estimated" if value is None else duration(value)) for name, value in self.steps.items())
        yield "time", f"{self.time()} ({', '.join(map(' '.join, parts))})"
        yield "memory", self.size()
        if self.placement is not None and self.placement.was_chosen:
            yield "devices", self.placement.text()
        yield from (("warning", sentence) for sentence in self.warnings)

    def size(self, more: int = 0) -> str:
        """Write the memory with `more` bytes; activations are extra unless the method counts them."""
        activations = self.method.runs_bases and not (self.placement is not None and self.placement.extra)
        devices = 1 if self.placement is None else self.placement.devices
        each = f" on each of {devices} devices" if devices > 1 else ""
        return f"{_gb(self.memory + more)}{each}{', and activations' if activations else ''}"

    def time(self, adapters: int = 1) -> str:
        """Write the time in round figures, such as "4 min"; "over" if a step is not known."""
        if set(self.steps.values()) == {None}:
            return "not estimated"
        over = "over " if None in self.steps.values() else ""
        return over + duration(self.seconds(adapters))


def estimate(plan: Plan, options: TransferOptions) -> Estimate:
    """Estimate a transfer from the sizes of its bases; no weight is read.

    Raises:
        CheckpointError: the bases have to run, and the decoder does not support one.
        UsageError, MemoryError: see `place_bases`.
    """
    method, costs = plan.method, costs_of(plan, options)
    rank = getattr(method, "fit_rank", plan.rank if method.truncates else None)
    modules = len(plan.modules) if method.map_method is not None else fitted_modules(method, plan.target)
    examples = len(plan.examples)
    if plan.bases is None:  # how fast a queried source answers is not known
        placement = place_bases([plan.target], method, replace(options, effect="never"))
        steps = dict.fromkeys(costs)
        return Estimate(
            method, plan.reason, modules, rank, steps, placement.peak, placement, examples, plan.mismatch_warnings
        )
    memory, placement, bases = _group_memory(plan), None, (plan.pair.source, plan.target)
    if method.runs_bases or options.effect == "always":
        placement = place_bases(bases, method, options)
        memory = max(memory, placement.peak)
    if method.runs_bases and not method.holds_bases:
        size = 4 if method.requires & {EvidenceKind.ACTIVATIONS, EvidenceKind.PROBE_TEXTS} else fast_dtype().itemsize
        memory = max(memory, size * sum(map(held_numbers, bases)))
    steps = seconds_of(costs, plan.pair, method)
    return Estimate(method, plan.reason, modules, rank, steps, memory, placement, examples, plan.mismatch_warnings)


def costs_of(plan: Plan, options: TransferOptions) -> dict[str, Cost | None]:
    """Return the cost of each step of a transfer, by its displayed name, in order; None if it is unknown."""
    method, found = plan.method, dict[str, Cost | None]()
    if plan.bases is None:
        return method.cost(plan)
    if not plan.prompts and plan.needs_text:
        found["write"] = probes_cost(plan.text_count)
    if method.map_method is not None and plan.groups is None:
        found[ALIGN] = evidence_cost(plan, plan.text_count)
    found |= method.cost(plan)
    if options.checks_effect(runs_bases=method.runs_bases):
        found[EFFECT] = effect_cost(written=method.uses_examples)
    return found


def fitted_modules(method: Method, target: BaseModel) -> int:
    """Count the target modules that a method without maps fits; UsageError if no module has a requested role."""
    counts = Counter(module.role for module in target.modules.values())
    return sum(counts[role] for role in roles_named(getattr(method, "roles", None), counts))


def _group_memory(plan: Plan) -> int:
    """Return the bytes of the largest group: float32 weights, and the factors of both bases and of the maps."""

    def held(pairs: Sequence[Pair]) -> int:
        first, source, target = pairs[0], plan.pair.source, plan.pair.target
        sides = source.modules[first.source].shape, target.modules[first.target].shape
        rank = min(plan.rank, *sides[0], *sides[1])
        return len(pairs) * sum(4 * (o * i + 2 * rank * (o + i)) for o, i in sides)

    return max(map(held, plan.chunks()), default=0)


@dataclass(frozen=True)
class Placement:
    """The placement of weights in a fit and the check of its effect. Sizes are bytes on a device.

    Attributes:
        devices: number of devices that share the weights; 1 puts them whole on the first.
        there: number of available devices.
        weights: largest size of the weights at any time.
        whole: the same for undivided weights.
        extra: largest size of what a fit needs in addition to its weights.
        free: free bytes; None if unknown or irrelevant.
        streamed: bytes of the source's layers, in the dtype of a fit, that stay in the host's memory; 0 if none do.
        peak: the larger of a fit (weights and extra) and of the check; on a CPU including `PROCESS`.
    """

    devices: int
    there: int
    weights: int
    whole: int
    extra: int
    free: int | None
    streamed: int = 0
    peak: int = 0

    @property
    def mesh(self) -> Mesh | None:
        """The devices that share the weights; None if the first has all."""
        return None if self.devices == 1 else mesh_of(self.devices)

    @property
    def was_chosen(self) -> bool:
        """True if there are several devices, and their memory is known or the user chose to divide or stream."""
        return bool(self.streamed) or self.devices > 1 or (self.there > 1 and self.free is not None)

    def announce(self) -> None:
        """Print the placement if there was a choice and progress is shown."""
        if shows_progress() and self.was_chosen:
            say(f"devices: {self.text()}")

    def record(self) -> dict[str, Any]:
        """Return the figures as a JSON value."""
        figures = {"devices": self.devices, "devices_there": self.there, "weights_bytes": self.weights}
        figures |= {"whole_bytes": self.whole, "extra_bytes": self.extra, "free_bytes": self.free}
        return figures | {"streamed_bytes": self.streamed}

    def text(self) -> str:
        """Describe the placement and its reason, without a full stop."""
        extra = f", and up to {_gb(self.extra)} on top" if self.extra else ""
        free = "" if self.free is None else f", where {_gb(self.free)} are free"
        if self.streamed:
            free += (
                f"; the layers of the source stay in the host's memory: each batch that it reads and each token that "
                f"it writes moves {_gb(self.streamed)} to the device"
            )
        if self.devices == 1:
            return f"1 of {self.there} has all weights: {_gb(self.weights)}{extra}{free}"
        of = "" if self.devices == self.there else f" of {self.there}"
        return f"{self.devices}{of} share the weights: {_gb(self.weights)} of {_gb(self.whole)} on each{extra}{free}"


def place_bases(bases: Sequence[BaseModel], method: Method, options: TransferOptions) -> Placement:
    """Choose the devices for the weights of the bases that a transfer runs; `bases` has the target last.

    Raises:
        UsageError: `divide` asks to divide weights that cannot be divided, or to stream a source that is only queried.
        MemoryError: the weights of a fit do not fit into the devices in any division, or the streamed layers do not fit
            into the host's memory.
    """
    fit_size = fast_dtype().itemsize if method.holds_bases else 0
    check_size = _CHECKED if options.checks_effect(runs_bases=method.runs_bases) else 0

    source = bases[0] if len(bases) > 1 else None

    def held(count: int, *, streams: bool) -> list[int]:
        return [held_numbers(base, count, streamed=streams and base is source) for base in bases]

    def fitted(count: int, *, streams: bool) -> int:
        return fit_size and fit_size * sum(held(count, streams=streams))

    def largest(count: int, *, streams: bool) -> int:
        checked = check_size and check_size * max(held(count, streams=streams))
        return max(fitted(count, streams=streams), checked)

    free, there, streams = free_of_each(), jax.local_device_count(), options.divide == "stream"
    extra = 0
    if method.holds_bases:
        # On a CPU a fit caches less when memory is short; several devices share the weights instead.
        host = free_memory() if jax.default_backend() == "cpu" else None
        left = None if host is None else max(0, host - fitted(1, streams=streams))
        extra = method.memory(bases[-1], left) or 0
    if streams and source is None:
        raise UsageError("divide stream was asked for, and the source is not run here: leave it out")
    divide = "auto" if streams else options.divide
    placement = choose_placement(partial(largest, streams=streams), extra, there, free, divide)
    if free is not None and placement.weights > free and divide == "auto" and source is not None:
        streams = True
        placement = choose_placement(partial(largest, streams=True), extra, there, free, divide)
    if streams and source is not None:
        numbers = streamed_numbers(source)
        check_host(max(fit_size, check_size) * numbers, of="the layers of the source")
        placement = replace(placement, streamed=(fit_size or check_size) * numbers)
    needed = fitted(placement.devices, streams=streams)
    if free is not None and needed > free:
        of = "a device" if placement.devices == 1 else f"each of {placement.devices} devices"
        msg = f"the weights of the fit take {_gb(needed)} of {of}, where {_gb(free)} are free"
        raise MemoryError(msg + ("; divide never was asked for" if divide == "never" else ""))
    own = PROCESS if jax.default_backend() == "cpu" else 0
    return replace(placement, peak=max(needed + extra, placement.weights + (check_size and _COMPARED)) + own)


def free_of_each() -> int | None:
    """Return the free bytes of each device; None if unknown, and on a CPU, whose devices share one memory."""
    return None if jax.default_backend() == "cpu" else free_memory(jax.local_device_count())


def choose_placement(
    weights: Callable[[int], int], extra: int, there: int, free: int | None, divide: Divide
) -> Placement:
    """Choose the number of devices: all that leave the least on each, or one.

    `weights` maps the number of devices to the bytes of weights on each; for the others see `Placement`.

    Raises UsageError if `divide` is "always", and no number of devices divides the weights.
    """
    # A number that divides few of the matrices can leave more on each device than a smaller number.
    most = min(range(1, there + 1), key=weights)
    if divide == "always" and most == 1:
        msg = f"divide always was asked for, and the weights cannot be divided over {there} device{'s'[: there > 1]}: "
        raise UsageError(msg + "leave it out")
    fits = free is None or weights(1) + extra <= free
    devices = most if divide == "always" or (divide == "auto" and not fits) else 1
    return Placement(devices, there, weights(devices), weights(1), extra, free)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
