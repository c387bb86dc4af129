"""Seconds of the steps of a transfer: forward passes and decompositions are counted, and one of each is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from math import ceil

import jax.numpy as jnp
from jax.typing import DTypeLike

from jcrosslora.alignment.task import AlignmentTask
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import fast_dtype
from jcrosslora.evaluate.effect_check import LENGTH, TEXTS
from jcrosslora.evidence.records import EvidenceKind
from jcrosslora.fit.distill.batches import BATCH
from jcrosslora.fit.distill.completions import PILOT, PILOT_TOKENS
from jcrosslora.fit.distill.discovery.asking import JUDGED_TOKENS
from jcrosslora.fit.distill.discovery.openings import ANSWER, OPENINGS
from jcrosslora.fit.distill.discovery.requests import ALIKE, REQUEST
from jcrosslora.fit.distill.discovery.search import PROBES
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.similar_prompts import FEWEST
from jcrosslora.fit.distill.templates import TEMPLATES
from jcrosslora.lineage.pairing import SIMILAR, Pair
from jcrosslora.methods import InterpolatedCopy, MapMethod, Method
from jcrosslora.session.effect import EFFECT, FINISH
from jcrosslora.session.settings import TransferOptions
from jcrosslora.session.timing import SVD_SIDE, Stopwatch, layer_size

# Steps of a transfer are named as the work names itself on the display.
ALIGN = "align"
SHARED = ("write", "compare layers", ALIGN, "interpolate")  # made once for all adapters

# Seconds that a step which runs the bases takes to compile, about the same for models of any size.
_COMPILING, _WITHOUT_BASES = 12, (ALIGN, "interpolate")
_TEXTS, _TOKENS = 8, 64  # the text that one forward pass reads, unless said otherwise
_SHAPE = _TEXTS, _TOKENS
_ROWS = 48  # texts that are written together
_PROBE_TOKENS = 96  # of a text that the source writes
_PROMPT_TOKENS = 32  # of a prompt that the source writes
_SHOTS_LENGTH = 2 / ALIKE  # of what stands in front of requests, for each of them, in times of `_TOKENS`
_WIDTHS = 4  # widths of rows that completions of one kind have
# Against a layer as it is timed, measured with SmolLM2-135M on one core: a token with the cache of those before takes
# 1.5 times as long (4.3 ms instead of 2.8 for 48 texts), and so do the prompts of 48 texts (104 to 115 ms instead of 73
# in passes of 8 texts), which are read with the adapter and kept in the cache.
_CACHED, _PREFILL = 1.5, 1.5
# Share of the time of a square matrix's SVD that its eigendecomposition takes (0.3 to 0.9 for sides of 256 to 2048).
_EIGEN = 0.4
# Forward passes of the target that take as long as the products of activations of both bases (for two bases of width
# 600 there are 12 million numbers for each layer of 3.5 million parameters), and as the grams of each.
_MOMENTS, _GRAMS = 4, 8


def step_seconds(
    task: AlignmentTask, options: TransferOptions, prompts: int, stopwatch: Stopwatch | None, *, aligned: bool = False
) -> dict[str, float | None]:
    """Name the steps of a transfer, in order, with their seconds.

    Args:
        task: the alignment.
        options: of the transfer.
        prompts: how many texts the user gave.
        stopwatch: times one layer of each base and one matrix of each shape; None leaves all seconds unknown.
        aligned: whether the maps are there already.

    Raises:
        CheckpointError: the bases have to run, and the decoder does not support one.
    """
    planned = _plan(task, options, prompts, _Costs(task, stopwatch or Stopwatch()), aligned)
    if stopwatch is None:
        return dict.fromkeys(planned)
    compiling = {name: 0 if name in _WITHOUT_BASES else _COMPILING for name in planned}
    return {name: None if cost is None else cost() + compiling[name] for name, cost in planned.items()}


class _Costs:
    """Seconds of parts of the work."""

    def __init__(self, task: AlignmentTask, stopwatch: Stopwatch) -> None:
        self._bases, self._stopwatch = (task.pair.source, task.pair.target), stopwatch

    def read(self, passes: tuple[float, float], dtype: DTypeLike = jnp.float32, *, predicted: int = 0) -> float:
        """Time forward passes of source and target, with an output head of `predicted` tokens."""
        return sum(
            count * self._layers(base, _SHAPE, dtype, predicted)
            for base, count in zip(self._bases, passes, strict=True)
            if count
        )

    def step(self, count: float, fit: DistillSettings) -> float:
        """Time gradient steps of the target."""
        target, dtype = self._bases[1], fast_dtype()
        return count * self._sizes(target, fit.compared_tokens) * self._stopwatch.gradient(target, _SHAPE, dtype, fit)

    def write(self, tokens: float) -> float:
        """Time the source's writing of tokens, each for `_ROWS` texts."""
        source = self._bases[0]
        return tokens * _CACHED * self._layers(source, (_ROWS, 1), fast_dtype(), source.dims.vocab)

    def decompose(self, shape: tuple[int, int], rank: int, method: Method) -> float:
        """Time the truncated SVD of one matrix."""
        vectors = method.start is not None and method.start.single_vectors
        return self._stopwatch.decomposition(shape, min(rank, *shape), vectors=vectors)

    def svd(self, rows: int, columns: int) -> float:
        """Scale the time of a full SVD to a matrix of another shape: those of activations would take minutes."""
        return self._stopwatch.full_svd() * rows * columns * min(rows, columns) / SVD_SIDE**3

    def _layers(self, base: BaseModel, shape: tuple[int, int], dtype: DTypeLike, predicted: int) -> float:
        """Time all layers and the output head."""
        return self._sizes(base, predicted) * self._stopwatch.layer(base, shape, dtype)

    @staticmethod
    def _sizes(base: BaseModel, predicted: int) -> float:
        """Count the layers and the output head, whose products take as long as those of a layer of its size."""
        return base.dims.layers + predicted * base.dims.hidden / layer_size(base)


def _plan(
    task: AlignmentTask, options: TransferOptions, prompts: int, costs: _Costs, aligned: bool
) -> dict[str, Callable[[], float] | None]:
    """Name the steps in order, each with the function that finds its seconds."""
    method, needs = task.method, task.method.requires
    texts = prompts or options.probe_count
    probes = texts * _PROBE_TOKENS / (_TEXTS * _TOKENS)  # forward passes of all probe texts
    found: dict[str, Callable[[], float] | None] = {}
    if not prompts and ((task.reads_probes and not aligned) or EvidenceKind.PROBE_TEXTS in needs):
        found["write"] = lambda: costs.write(_PROBE_TOKENS * ceil(texts / _ROWS))
    if task.depth == SIMILAR and not aligned:
        found["compare layers"] = lambda: costs.read((probes, probes))
    if not (aligned or method.start is None):
        # An embedding map reads both embeddings, matches heads and inverts weights, none of which is counted.
        found[ALIGN] = None if EvidenceKind.EMBEDDING_MAP in needs else lambda: _alignment(task, probes, costs)
    if isinstance(method, DistillSettings):
        found |= _distillation(method, prompts, costs)
    elif EvidenceKind.PROBE_TEXTS in needs:
        # Each layer once without and once with the update; the products are about as much again on the target.
        found["fit the residual stream"] = lambda: costs.read((2 * probes, 4 * probes))
    elif isinstance(method, InterpolatedCopy):
        shapes = [module.shape for module in task.pair.target.modules.values()]
        found["interpolate"] = lambda: sum(costs.decompose(shape, task.rank, method) for shape in shapes)
    elif type(method).move is not MapMethod.move:
        found[FINISH] = None
    if options.checks_effect(runs_bases=method.runs_bases):
        found[EFFECT] = lambda: _effect(task, written=isinstance(method, DistillSettings), costs=costs)
    return found


def _alignment(task: AlignmentTask, probes: float, costs: _Costs) -> float:
    """Count the evidence of the kinds that take time, and the maps that are made from it."""
    method, needs, seconds = task.method, task.method.requires, 0.0
    shapes = [sides_of(task, pair) for pair in task.modules]
    if EvidenceKind.SINGULAR_VECTORS in needs:
        seconds += sum(costs.decompose(shape, task.rank, method) for sides in shapes for shape in sides)
    if EvidenceKind.ACTIVATIONS in needs:
        grams = EvidenceKind.ACTIVATION_GRAMS in needs
        seconds += costs.read((probes, (1 + _MOMENTS + (_GRAMS if grams else 0)) * probes)) + _COMPILING
        for src, tgt in shapes:
            # One SVD of the cross-moment of the outputs, and one of the inputs; eigenvectors of the moments of each.
            seconds += sum(map(costs.svd, src, tgt))
            seconds += _EIGEN * sum(costs.svd(side, side) for side in (*src, *tgt)) if grams else 0
    return seconds


def _distillation(settings: DistillSettings, prompts: int, costs: _Costs) -> dict[str, Callable[[], float]]:
    """Count what `jcrosslora.fit.distill` does with the default widths of rows."""
    count = settings.rounds[0]
    # How long answers are is not known before some are written.
    rounds, tokens, judged = ceil(count / _ROWS), settings.answer_tokens or PILOT_TOKENS // 2, 0.0
    written, prefilled = 0.0, 0.0
    if FEWEST <= prompts < count:  # the base writes others like them
        similar = ceil((count - prompts) / _ROWS)
        written, prefilled = similar * _PROMPT_TOKENS, similar * _SHOTS_LENGTH
    if not prompts:
        pilot = PILOT * len(TEMPLATES)
        rounds, tokens = rounds + ceil(pilot / _ROWS), tokens + _PROMPT_TOKENS
        judged = 2 * pilot * len(TEMPLATES) / _TEXTS  # every pilot in every template, with and without the adapter
    written += rounds * tokens
    passes = _PREFILL * (rounds + prefilled) * _ROWS / _TEXTS + judged
    if settings.discovery and not prompts:
        written, passes = written + _search(settings)[0], passes + _search(settings)[1]
    # What is fitted to and what is held out each end with a batch of each width that is half full.
    rest = _WIDTHS / 2 * BATCH
    held, fitted = settings.held_out * count + rest, (1 - settings.held_out) * count + rest
    dtype = fast_dtype()

    def write() -> float:
        return costs.write(written) + costs.read((passes, 0), dtype)

    def fit() -> float:
        given = (fitted, held), 1 if prompts else 2, tokens, costs
        if settings.seconds is None:
            return _fit(settings, *given)
        # What is written before is fitted to even where the time is used up.
        first = dataclasses.replace(settings, completions=count)
        return max(_fit(first, *given), settings.seconds - write())

    return {"write completions": write, "fit": fit}


def _search(settings: DistillSettings) -> tuple[float, float]:
    """Count what the search for an adapter's job writes, in tokens of `_ROWS` texts, and its forward passes.

    Requests are counted as the source's, though the target writes them if it is better at that.
    """
    answer, loud = settings.answer_tokens or PILOT_TOKENS // 2, len(OPENINGS)
    # Both models write what is amplified; requests and answers are written twice.
    written = 2 * sum(tokens for _, tokens in OPENINGS) + ANSWER + 2 * (REQUEST + answer)
    prefilled = 2 * loud + 1 + 2 * (_SHOTS_LENGTH + 1)
    # What was amplified is judged, what follows it, and both rounds of answers, with and without the adapter.
    judged = 2 * (loud + 3)
    texts = ceil(settings.discovery / _ROWS) * _ROWS
    # Requests of all kinds of jobs are answered and judged likewise.
    probes = ceil(PROBES / _ROWS) * _ROWS
    rows = texts * written + probes * JUDGED_TOKENS
    return rows / _ROWS, ((_PREFILL * prefilled + judged) * texts + (_PREFILL + 2) * probes) / _TEXTS


def _fit(settings: DistillSettings, rows: tuple[float, float], texts: int, tokens: int, costs: _Costs) -> float:
    """Count a fit.

    Args:
        settings: of the fit.
        rows: texts written before it, to fit to and held out, with those that batches have room for.
        texts: that are written for each completion of further rounds.
        tokens: of each text.
        costs: of writing and reading.
    """
    # Imported here: methods that look at weights alone need no optimiser.
    from jcrosslora.fit.distill.fit import LOOK

    further, anew = len(settings.rounds) - 1, sum(settings.rounds[1:]) / _TEXTS
    fitted, held = rows[0] / _TEXTS, rows[1] / _TEXTS
    steps = settings.passes * (fitted + anew)
    looks = 1 + steps * _TEXTS / BATCH / LOOK
    source = 2 * (fitted + held + anew) + _PREFILL * texts * anew
    target = fitted + anew + (1 + looks) * held
    read = costs.read((source, target), fast_dtype(), predicted=settings.compared_tokens)
    return costs.write(further * tokens) + read + costs.step(steps, settings)


def _effect(task: AlignmentTask, *, written: bool, costs: _Costs) -> float:
    """Count the check of the effect: two kinds of texts, without and with the adapter."""
    passes = 2 * TEXTS * LENGTH / (_TEXTS * _TOKENS) * (1 if written else 2)
    read = sum(
        costs.read(sides, predicted=base.dims.vocab)
        for base, sides in ((task.pair.source, (passes, 0)), (task.pair.target, (0, passes)))
    )
    return read if written else read + costs.write(LENGTH)


def sides_of(task: AlignmentTask, pair: Pair) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes (O, I) of the two modules of a pair."""
    return task.pair.source.modules[pair.source].shape, task.pair.target.modules[pair.target].shape
