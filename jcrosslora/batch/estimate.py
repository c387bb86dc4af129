"""What a batch would do, and what it would take: shapes are counted, and one matrix of each shape is timed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Column, Table

from jcrosslora.batch.plan_file import BatchPlan
from jcrosslora.batch.run import CHUNK_BYTES
from jcrosslora.batch.units import Unit, share_of, units_of
from jcrosslora.checkpoint import open_base
from jcrosslora.errors import JCrossLoRAError, MethodError, PairingError
from jcrosslora.evidence.kinds import EvidenceKind
from jcrosslora.linalg import decompose
from jcrosslora.methods import Method, make_method
from jcrosslora.session.pair_session import PairSession
from jcrosslora.session.settings import flat_method


@dataclass(frozen=True)
class Estimate:
    """What the jobs of a unit take.

    Attributes:
        method: the one that will be used, also where "auto" was asked for.
        pairs: modules to align.
        seconds: of all decompositions, from one matrix of each shape timed here; None where the method runs the bases,
            whose time depends on the texts, or adds the difference between their weights, adapter by adapter.
        memory: bytes of the largest group's weights, factors and maps, and of a chunk of adapters before and after;
            None for the same methods. Bases that are run are in memory then.
    """

    method: Method
    pairs: int
    seconds: float | None
    memory: int | None


def estimate(unit: Unit, times: dict[tuple[int, ...], float] | None = None) -> Estimate:
    """Estimate a unit from the headers of its bases; nothing of them is read but for what `auto` looks at.

    No adapter is read: the figures are of one of all modules that the bases have.

    Args:
        unit: of a plan.
        times: seconds of one decomposition, by (O, I, R), kept between calls.

    Raises:
        JCrossLoRAError: the bases cannot be opened or do not fit the method.
    """
    times = {} if times is None else times
    settings = unit.settings
    source = open_base(settings.source, revision=settings.source_revision)
    target = open_base(settings.target, revision=settings.target_revision, name=settings.target_name)
    session = PairSession(source, target)
    method, _ = session.resolve(make_method(settings.method))
    task = session.plan(method, settings, None)
    chunks = list(task.chunks())
    count = sum(map(len, chunks))
    if method.has_finalize or method.runs_bases:
        return Estimate(method, count, None, None)
    seconds, largest = 0.0, 0
    for pairs in chunks:
        sides = source.modules[pairs[0].source].shape, target.modules[pairs[0].target].shape
        rank = min(task.rank, *sides[0], *sides[1])
        seconds += len(pairs) * sum(_seconds(method, (*side, rank), times) for side in sides)
        # Weights as float32, and of each side both factors, once as decomposed and once in the maps.
        largest = max(largest, len(pairs) * sum(4 * (o * i + 2 * rank * (o + i)) for o, i in sides))
    return Estimate(method, count, seconds, largest + 2 * CHUNK_BYTES)


def print_estimates(plan: BatchPlan, console: Console, *, shard: tuple[int, int] = (1, 1)) -> None:
    """A table of the units of a plan (or of a shard) with what they take, or why they cannot be done.

    For adapters of all modules: those of fewer take less, and may be moved where these cannot.
    """
    names = ("source", "target", "method", "jobs", "modules", "decompositions", "memory")
    table = Table(*(Column(name, overflow="fold") for name in names))
    times: dict[tuple[int, ...], float] = {}
    for unit in share_of(units_of(plan.jobs), *shard):
        settings = unit.settings
        row = [settings.source, settings.target]
        try:
            found = estimate(unit, times)
        except JCrossLoRAError as error:
            # What fails on some modules does not on an adapter without them.
            of_modules = isinstance(error, MethodError | PairingError)
            what = "an adapter of all modules cannot be moved" if of_modules else "cannot be done"
            table.add_row(*row, flat_method(settings.method)["method"], str(len(unit.jobs)), "", "", f"{what}: {error}")
            continue
        unknown = ("runs both bases", "both bases") if found.method.runs_bases else ("not estimated",) * 2
        time_text = unknown[0] if found.seconds is None else f"{found.seconds:.1f} s"
        memory = unknown[1] if found.memory is None else f"{found.memory / 1e9:.2f} GB"
        table.add_row(*row, found.method.name, str(len(unit.jobs)), str(found.pairs), time_text, memory)
    console.print(table, markup=False)


def _seconds(method: Method, shape: tuple[int, int, int], times: dict[tuple[int, ...], float]) -> float:
    if EvidenceKind.SINGULAR_VECTORS not in method.requires:
        return 0.0
    if shape not in times:
        stack = jax.random.normal(jax.random.key(0), (1, *shape[:2]))
        for _ in range(2):  # the first time it is compiled
            start = time.perf_counter()
            jax.block_until_ready(decompose(jnp.asarray(stack), shape[2], vectors=method.single_vectors)[0])
            times[shape] = time.perf_counter() - start
    return times[shape]
