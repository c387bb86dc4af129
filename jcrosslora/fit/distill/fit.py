"""The fit: steps in closed form, each from fresh completions, each as long as held-out completions allow.

A step goes by all completions so far. Those of the steps before it were read when the target was not updated so far: the
factors of the Fisher matrices, which change little, are taken as they are; of the gradient what the limit on the rank
left over of it in each step (error feedback: Karimireddy et al. 2019, arXiv 1901.09847).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder import INPUT_SITES, DecoderSettings, Params, StackedAdapter, StackedFactors
from jcrosslora.fit.distill.batches import DistillationBatch
from jcrosslora.fit.distill.reader import Reader, shared_log_probs, teach, weighted_kl
from jcrosslora.fit.distill.settings import FitSettings
from jcrosslora.fit.distill.solve import step_factors
from jcrosslora.fit.distill.statistics import Read, Statistics, add_batch, keeps_much, no_statistics
from jcrosslora.utils.progress import track

_FIRST = 2.0  # length of the first step that is tried
_SHRINKS, _GROWTHS = 6, 8


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """An adapter of the target, and the held-out KL before the first step and after each."""

    adapter: StackedAdapter
    divergences: tuple[float, ...]


class Teacher:
    """What the target should predict on a batch_of_completions."""

    def __init__(
        self, source: Reader, target: Reader, adapter: StackedAdapter, teacher_weight: float, contrast_weight: float
    ) -> None:
        self.source, self.target = source, target
        self.teacher_weight, self.contrast_weight = jnp.float32(teacher_weight), jnp.float32(contrast_weight)
        self.adapter, self.none = adapter, jax.tree.map(jnp.zeros_like, adapter)

    def read(self, batch_of_completions: DistillationBatch) -> Read:
        """The batch_of_completions as the target reads it."""
        batch, src, tgt = batch_of_completions.batch, self.source, self.target
        tokens_src, mask_src, at_src = (
            src.rows(batch.tokens_src),
            jnp.asarray(batch.mask_src),
            jnp.asarray(batch.at_src),
        )
        tokens_tgt, mask_tgt, at_tgt = (
            tgt.rows(batch.tokens_tgt),
            jnp.asarray(batch.mask_tgt),
            jnp.asarray(batch.at_tgt),
        )
        base, adapted = (
            shared_log_probs(src.settings, src.params, one, tokens_src, mask_src, at_src)
            for one in (self.none, self.adapter)
        )
        own = shared_log_probs(tgt.settings, tgt.params, None, tokens_tgt, mask_tgt, at_tgt)
        teacher = teach(own, base, adapted, self.teacher_weight, self.contrast_weight)
        return Read(tokens_tgt, mask_tgt, at_tgt, jnp.asarray(batch_of_completions.weight), teacher)


def fit(
    teacher: Teacher,
    distillation_batches: Sequence[Sequence[DistillationBatch]],
    held_out: Sequence[DistillationBatch],
    settings: FitSettings,
    start: StackedAdapter | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Fitted:
    """Fit an adapter of the target to the teacher; one step for each set of distillation_batches."""
    target = teacher.target
    adapter = _room(target.params, start, settings, len(distillation_batches))
    kept = [teacher.read(batch_of_completions) for batch_of_completions in held_out]
    best, length = held_out_kl(target, adapter, kept), _FIRST
    history = [best]
    total = sum(len(part) for part in distillation_batches)
    with track(total, "fit", "batches", show=progress) as bar:
        totals = no_statistics(target.params, settings.roles)
        for number, part in enumerate(distillation_batches):
            for place, batch_of_completions in enumerate(part):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), place)
                read = teacher.read(batch_of_completions)
                remat = keeps_much(target.settings, read.tokens.shape)
                totals = add_batch(target.settings, totals, target.params, adapter, read, key, remat=remat)
                jax.block_until_ready(totals)
                bar.update()
            steps, behind = solve(totals, settings.rank, number + 1)
            left = len(distillation_batches) - number
            adapter, best, length = _line_search(target, adapter, steps, left, kept, best, length or _FIRST)
            totals = behind if length else totals
            history.append(best)
            bar.note = f"KL {best:.4f}"
    return Fitted(adapter, tuple(history))


def solve(totals: Statistics, rank: int, parts: int = 1) -> tuple[dict[str, StackedFactors], Statistics]:
    """The step of every module, and the sums behind it.

    Args:
        totals: sums over `parts` sets of distillation_batches.
        rank: of each module's step at most.
        parts: the sums are divided by it, so that steps have comparable lengths.

    Returns:
        role -> b (L, O, rank) and a (L, rank, I), and the sums with the gradient that the rank has left over.
    """
    steps, gradients = {}, {}
    for role in totals.gradients:
        a, g = totals.inputs[INPUT_SITES[role]], totals.outputs[role]
        own = min(rank, *totals.gradients[role].shape[1:])
        steps[role], gradients[role] = jax.block_until_ready(
            _solve_stack(totals.gradients[role], a, g, jnp.float32(parts), own)
        )
    return steps, dataclasses.replace(totals, gradients=gradients)


@partial(jax.jit, static_argnames="rank")
def _solve_stack(
    gradients: jax.Array, a: jax.Array, g: jax.Array, parts: jax.Array, rank: int
) -> tuple[StackedFactors, jax.Array]:
    def one(item: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[StackedFactors, jax.Array]:
        gradient, inputs, outputs = (each / parts for each in item)
        b, a, rest = step_factors(gradient, inputs, outputs, rank)
        return StackedFactors(a=a, b=b), rest * parts

    # One layer after another on all devices: what the decompositions need, side by side, is many times the sums.
    return lax.map(one, (gradients, a, g))


def held_out_kl(target: Reader, adapter: StackedAdapter, kept: Sequence[Read]) -> float:
    """Mean KL(teacher || target with the adapter), nats a position."""
    sums = [_loss(target.settings, target.params, adapter, read) for read in kept]
    return float(sum(loss for loss, _ in sums) / sum(weight for _, weight in sums))


@partial(jax.jit, static_argnums=0)
def _loss(
    settings: DecoderSettings, params: Params, adapter: StackedAdapter, read: Read
) -> tuple[jax.Array, jax.Array]:
    student = shared_log_probs(settings, params, adapter, read.tokens, read.mask, read.at)
    return weighted_kl(read.teacher, student, read.weight)


def _line_search(
    target: Reader,
    adapter: StackedAdapter,
    steps: dict[str, StackedFactors],
    left: int,
    kept: Sequence[Read],
    best: float,
    length: float,
) -> tuple[StackedAdapter, float, float]:
    """The adapter with the steps at the length that is best on held-out distillation_batches: doubled or halved until it is."""

    def at(length: float) -> tuple[StackedAdapter, float]:
        moved = _placed(adapter, steps, left, length)
        return moved, held_out_kl(target, moved, kept)

    found, size = (adapter, best), 0.0
    tried = length
    moved = at(tried)
    for _ in range(_SHRINKS):
        if moved[1] < best:
            break
        tried /= 2
        moved = at(tried)
    if moved[1] < best:
        found, size = moved, tried
        for _ in range(_GROWTHS):
            nxt = at(size * 2)
            if not nxt[1] < found[1]:
                break
            found, size = nxt, size * 2
    return found[0], found[1], size


def _room(params: Params, start: StackedAdapter | None, settings: FitSettings, steps: int) -> StackedAdapter:
    """The starting adapter with zeros where the steps will be, so that nothing is compiled again."""
    roles = dict.fromkeys([*(start.roles if start else ()), *settings.roles])
    found = {}
    for role in roles:
        layers, rows, columns = params.weights[role].shape
        own = start.roles.get(role) if start else None
        first = 0 if own is None else own.a.shape[1]
        size = first + (min(settings.rank, rows, columns) * steps if role in settings.roles else 0)
        a, b = jnp.zeros((layers, size, columns)), jnp.zeros((layers, rows, size))
        if own is not None:
            a, b = a.at[:, :first].set(own.a), b.at[:, :, :first].set(own.b)
        found[role] = StackedFactors(a, b)
    return StackedAdapter(found)


def _placed(adapter: StackedAdapter, steps: dict[str, StackedFactors], left: int, length: float) -> StackedAdapter:
    """The adapter with steps of a length in the first of the `left` places for one at the end of each role's ranks."""
    roles = dict(adapter.roles)
    for role, step in steps.items():
        own = roles[role]
        size = step.a.shape[1]
        first = own.a.shape[1] - left * size
        place = slice(first, first + size)
        roles[role] = StackedFactors(own.a.at[:, place].set(step.a), own.b.at[:, :, place].set(step.b * length))
    return StackedAdapter(roles)
