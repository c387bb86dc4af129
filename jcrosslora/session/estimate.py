"""What a transfer takes before it runs: its steps with their seconds, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import fast_dtype
from jcrosslora.decoder.weight_sizes import held_numbers
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.evaluate.effect_check import effect_cost
from jcrosslora.evaluate.probes.writing import probes_cost
from jcrosslora.maps.alignment.groups import ALIGN
from jcrosslora.maps.alignment.layer_similarity import similarity_cost
from jcrosslora.maps.alignment.task import AlignmentTask
from jcrosslora.maps.evidence.providers import evidence_cost
from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.method import Sizes
from jcrosslora.methods import Method
from jcrosslora.relation.pairing import SIMILAR
from jcrosslora.session.effect import EFFECT
from jcrosslora.session.placement import Placement, place_bases
from jcrosslora.session.settings import TransferOptions
from jcrosslora.session.timing import Stopwatch
from jcrosslora.utils.cost import Cost
from jcrosslora.utils.progress import duration

_SHARED = ("write", "compare layers", ALIGN, "interpolate")  # made once for all adapters


@dataclass(frozen=True)
class Estimate:
    """What an alignment, and the transfer of one adapter through it, take.

    Attributes:
        method: the one that will be used, also where "auto" was asked for.
        reason: why "auto" chose it; None where the user named it.
        modules: how many are aligned, or fitted.
        rank: of the truncated SVDs that the maps are made from, or the most that a fit gives; None where neither is.
        steps: seconds of each step, in order; None where they are not known.
        memory: bytes on a device: of both bases' weights where they run, with what a fit takes beside them; else of the
            largest group's weights, factors and maps.
        placement: where the weights lie that a fit and the check of the effect run; None where neither does.
    """

    method: Method
    reason: str | None
    modules: int
    rank: int | None
    steps: dict[str, float | None]
    memory: int
    placement: Placement | None = None

    def seconds(self, adapters: int = 1) -> float:
        """Sum the steps that are known, for adapters that share the alignment."""
        return sum(
            value * (1 if name in _SHARED else adapters) for name, value in self.steps.items() if value is not None
        )

    def record(self) -> dict[str, Any]:
        """Return the figures for one adapter as a JSON value."""
        return {
            "method": self.method.name,
            "why": self.reason,
            "modules": self.modules,
            "rank": self.rank,
            "steps": self.steps,
            "seconds": self.seconds(),
            "memory_bytes": self.memory,
            "placement": None if self.placement is None else self.placement.record(),
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield the figures for one adapter by name, in words."""
        yield "method", self.method.name + (f": {self.reason}" if self.reason else "")
        yield "modules", str(self.modules)
        if self.rank is not None:
            yield "rank", f"up to {self.rank}"
        parts = [
            f"{name} {'not estimated' if value is None else duration(value)}" for name, value in self.steps.items()
        ]
        yield "time", f"{self.time()} ({', '.join(parts)})"
        yield "memory", self.size()
        if self.placement is not None and self.placement.was_chosen:
            yield "devices", self.placement.text()

    def size(self, more: int = 0) -> str:
        """Write the memory with `more` bytes; without a fit activations come on top."""
        fits = isinstance(self.method, DistillSettings)
        beside = ", and activations" if self.method.runs_bases and not fits else ""
        devices = 1 if self.placement is None else self.placement.devices
        each = f" on each of {devices} devices" if devices > 1 else ""
        return f"{(self.memory + more) / 1e9:.2f} GB{each}{beside}"

    def time(self, adapters: int = 1) -> str:
        """Write the time in round figures, such as "4 min"; "over" where a step is not known."""
        if set(self.steps.values()) == {None}:
            return "not estimated"
        over = "over " if None in self.steps.values() else ""
        return over + duration(self.seconds(adapters))


def estimate(
    task: AlignmentTask, options: TransferOptions, prompts: int, stopwatch: Stopwatch, reason: str | None = None
) -> Estimate:
    """Estimate a transfer from the sizes of its bases; no weight is read.

    Args:
        task: the alignment.
        options: of the transfer.
        prompts: how many texts the user gave.
        stopwatch: times one layer of each base and one matrix of each shape.
        reason: why "auto" chose the method.

    Raises:
        CheckpointError: the bases have to run, and the decoder does not support one.
        UsageError, MemoryError: see `place_bases`.
    """
    method, bases = task.method, (task.pair.source, task.pair.target)
    rank = task.rank if method.truncates else None
    if isinstance(method, DistillSettings):
        rank = method.fit_rank
    memory, placement = _group_memory(task), None
    if task.runs_bases or options.effect == "always":
        placement = place_bases(bases, method, options)
        memory = max(memory, placement.weights + placement.beside)
    if task.runs_bases and not isinstance(method, DistillSettings):
        size = 4 if method.requires & {EvidenceKind.ACTIVATIONS, EvidenceKind.PROBE_TEXTS} else fast_dtype().itemsize
        memory = max(memory, size * sum(map(held_numbers, bases)))
    steps = stopwatch.seconds(costs_of(task, options, prompts), task.pair, method)
    modules = len(task.modules) if method.start is not None else fitted_modules(method, task.pair.target)
    return Estimate(method, reason, modules, rank, steps, memory, placement)


def costs_of(
    task: AlignmentTask, options: TransferOptions, prompts: int, *, aligned: bool = False
) -> dict[str, Cost | None]:
    """Count the steps of a transfer, by their names on the display, in order; None for what is not counted.

    Args:
        task: the alignment.
        options: of the transfer.
        prompts: how many texts the user gave.
        aligned: whether the maps are there already.
    """
    method, texts = task.method, prompts or options.probe_count
    found: dict[str, Cost | None] = {}
    if not prompts and ((task.reads_probes and not aligned) or EvidenceKind.PROBE_TEXTS in method.requires):
        found["write"] = probes_cost(texts)
    if task.depth == SIMILAR and not aligned:
        found["compare layers"] = similarity_cost(texts)
    if not (aligned or method.start is None):
        found[ALIGN] = evidence_cost(task.request, texts)
    found |= method.cost(Sizes(task.pair.target, prompts, texts, task.rank))
    if options.checks_effect(runs_bases=method.runs_bases):
        found[EFFECT] = effect_cost(written=isinstance(method, DistillSettings))
    return found


def fitted_modules(method: Method, target: BaseModel) -> int:
    """Count the modules of the target that a method without maps fits."""
    roles = getattr(method, "roles", None)
    return sum(roles is None or module.role in roles for module in target.modules.values())


def _group_memory(task: AlignmentTask) -> int:
    """Give the bytes of the largest group: weights as float32, and both factors as decomposed and as maps."""
    largest = 0
    modules = task.pair.source.modules, task.pair.target.modules
    for pairs in task.chunks():
        sides = modules[0][pairs[0].source].shape, modules[1][pairs[0].target].shape
        rank = min(task.rank, *sides[0], *sides[1])
        largest = max(largest, len(pairs) * sum(4 * (o * i + 2 * rank * (o + i)) for o, i in sides))
    return largest
