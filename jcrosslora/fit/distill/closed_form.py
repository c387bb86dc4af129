"""The fit without prompts: steps in closed form, each from fresh completions, as long as held-out ones allow.

On prompts that the source wrote itself gradient steps come nearer to the teacher, and fit real questions less.

A step uses all completions so far. Those of earlier steps were read with the update of that time. The factors of their
Fisher matrices, which change little, are kept as they are; of their gradient the part is kept that the limit on the
rank left over in each step (error feedback: Karimireddy et al. 2019, arXiv 1901.09847).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jcrosslora.checkpoint.family.names import MIXER_WRITERS
from jcrosslora.decoder import Params, StackedAdapter, StackedFactors
from jcrosslora.fit.distill.batches import DistillationBatch
from jcrosslora.fit.distill.fit import Fitted, Look, mean_kl, needs_remat
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.statistics import add_batch, zero_statistics
from jcrosslora.fit.distill.step import solve
from jcrosslora.fit.distill.teacher import ReducedBase, TaughtBatch, Teacher
from jcrosslora.utils.progress import track

# What attention and other mixers pass on, not where they look: all modules of a step have one length, and q and k,
# whose own best length is next to nothing, keep that of the others short. The sums of a module are as wide as its
# output, so that the wide projections in front of other mixers would need gigabytes.
VALUES = ("v_proj", *MIXER_WRITERS)
_FIRST = 2.0  # length of the first step that is tried
_SHRINKS, _GROWTHS = 6, 8  # how often a step's length is halved or doubled


def fit_in_closed_form(
    teacher: Teacher,
    parts: Sequence[Sequence[DistillationBatch]],
    held_out: Sequence[TaughtBatch],
    settings: DistillSettings,
    start: StackedAdapter | None = None,
    *,
    begun: float,
    seed: int = 0,
    progress: bool = False,
) -> Fitted:
    """Fit an adapter of the target to the teacher.

    Args:
        teacher: with the target in it.
        parts: the batches of each step.
        held_out: the batches that decide how long each step is, read by the teacher.
        settings: of the fit.
        start: an adapter of the target to start from; None starts from nothing.
        begun: `time.monotonic()` at the beginning.
        seed: of the tokens that are drawn for the Fisher matrices.
        progress: whether to show a progress bar.
    """
    target = teacher.target
    roles = settings.roles or tuple(role for role in VALUES if role in target.params.weights)
    adapter = _with_room(target.params, start, settings, roles, len(parts))
    best, length, used = mean_kl(target, adapter, held_out), _FIRST, 0
    looks = [Look(time.monotonic() - begun, 0, best)]
    with track(sum(map(len, parts)), "fit", "batches", show=progress) as bar:
        totals = zero_statistics(target.params, roles)
        for number, part in enumerate(parts):
            for place, batch in enumerate(part):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), place)
                taught = teacher.read(batch)
                remat = needs_remat(target.settings, taught.tokens.shape)
                totals = add_batch(
                    target.settings, totals, target.params, adapter, taught, key, remat=remat, ends=target.ends
                )
                jax.block_until_ready(totals)
                bar.update()
            steps, behind = solve(totals, settings.step_rank, number + 1)
            left = len(parts) - number
            adapter, best, length = _line_search(target, adapter, steps, left, held_out, best, length or _FIRST)
            totals = behind if length else totals
            used += sum(batch.rows for batch in part)
            looks.append(Look(time.monotonic() - begun, used, best))
            bar.note = f"divergence {best:.3f}"
    return Fitted(adapter, tuple(looks), 0, stopped=False)


def _line_search(
    target: ReducedBase,
    adapter: StackedAdapter,
    steps: dict[str, StackedFactors],
    left: int,
    kept: Sequence[TaughtBatch],
    best: float,
    length: float,
) -> tuple[StackedAdapter, float, float]:
    """Halve or double the steps' length until the held-out KL is lowest.

    Returns:
        The adapter with the steps, its KL and the length; the adapter as it was, `best` and 0 where no length is
        better.
    """

    def at(length: float) -> tuple[StackedAdapter, float]:
        moved = _placed(adapter, steps, left, length)
        return moved, mean_kl(target, moved, kept)

    moved = at(length)
    for _ in range(_SHRINKS):
        if moved[1] < best:
            break
        length /= 2
        moved = at(length)
    if not moved[1] < best:
        return adapter, best, 0.0
    for _ in range(_GROWTHS):
        longer = at(length * 2)
        if not longer[1] < moved[1]:
            break
        moved, length = longer, length * 2
    return *moved, length


def _with_room(
    params: Params, start: StackedAdapter | None, settings: DistillSettings, roles: tuple[str, ...], steps: int
) -> StackedAdapter:
    """Extend the starting adapter by zeros where the steps will be, so that nothing is compiled again."""
    begun = start.roles if start else {}
    made = {}
    for role in dict.fromkeys([*begun, *roles]):
        layers, rows, columns = params.weights[role].shape
        first = begun[role].a.shape[1] if role in begun else 0
        size = first + (min(settings.step_rank, rows, columns) * steps if role in roles else 0)
        a, b = jnp.zeros((layers, size, columns)), jnp.zeros((layers, rows, size))
        if role in begun:
            a, b = a.at[:, :first].set(begun[role].a), b.at[:, :, :first].set(begun[role].b)
        made[role] = StackedFactors(a, b)
    return StackedAdapter(made)


def _placed(adapter: StackedAdapter, steps: dict[str, StackedFactors], left: int, length: float) -> StackedAdapter:
    """Write steps of a length into the first of the `left` free places at the end of each role's ranks."""
    roles = dict(adapter.roles)
    for role, step in steps.items():
        own = roles[role]
        size = step.a.shape[1]
        first = own.a.shape[1] - left * size
        place = slice(first, first + size)
        roles[role] = StackedFactors(own.a.at[:, place].set(step.a), own.b.at[:, :, place].set(step.b * length))
    return StackedAdapter(roles)
