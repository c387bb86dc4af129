"""The refit: gradient steps in all modules on completions that are written anew, behind the closed-form steps.

The closed-form update stays as it is, and factors of a low rank are trained beside it. No completion is used twice:
divergence on old ones falls without that of new ones following. The last rounds are polished on what the target writes
with its own update, where the teacher corrects it (on-policy distillation: Agarwal et al. 2024, arXiv 2306.13649).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, StackedFactors, join_stacked
from jcrosslora.fit.distill.batches import DistillationBatch
from jcrosslora.fit.distill.fit import Fitted, mean_kl
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.statistics import needs_remat
from jcrosslora.fit.distill.teacher import TaughtBatch, Teacher, shared_log_probs, weighted_kl
from jcrosslora.utils.progress import track

ROUND = 48  # completions that are written together
_CHECK = 2  # rounds between two looks at the held-out completions
_WARM_UP = 0.05  # share of the refit over which the rate rises
_CLIP, _DECAYS = 1.0, (0.9, 0.99)
# Writes completions: the round, and the target's update if the target is to answer, None for the source's answers.
Fresh = Callable[[int, StackedAdapter | None], Sequence[DistillationBatch]]


@dataclass(frozen=True, eq=False)
class Refitted:
    """The result of a refit.

    Attributes:
        adapter: the best update by the held-out completions.
        divergences: held-out KL(teacher || target), nats a position: before the refit and at each look.
        completions: how many were written.
        stopped: whether it was interrupted.
    """

    adapter: StackedAdapter
    divergences: tuple[float, ...]
    completions: int
    stopped: bool


@flax.struct.dataclass
class RefitState:
    """Factors in training, with the state of the optimiser."""

    factors: StackedAdapter
    moments: Any


def refit(
    teacher: Teacher,
    fitted: Fitted,
    held_out: Sequence[TaughtBatch],
    fresh: Fresh,
    settings: DistillSettings,
    begun: float,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Refitted:
    """Train factors beside a fitted update until the completions or the time are used up; Ctrl-C keeps the best.

    Args:
        teacher: with the target in it, whose embeddings are all kept.
        fitted: the update to start from, with its divergence on `held_out`.
        held_out: completions that decide which update is the best, read by the teacher.
        fresh: writes the completions of a round.
        settings: of the fit.
        begun: `time.monotonic()` when the fit as a whole began, which the budget counts from.
        seed: of the first factors.
        progress: whether to show a progress bar.
    """
    target, frozen = teacher.target, fitted.adapter
    best, history = frozen, [fitted.divergences[-1]]
    state = first_state(target.params, settings, seed)
    limit, start, rounds, stopped = settings.seconds, time.monotonic(), 0, False

    def used() -> float:
        by_time = 0.0 if limit is None else (time.monotonic() - start) / max(1e-9, limit - (start - begun))
        return max(by_time, rounds * ROUND / settings.refit if settings.refit else 0.0)

    with track(settings.refit or 100, "refit", "completions" if settings.refit else "%", show=progress) as bar:
        try:
            while (share := used()) < 1:
                own = join_stacked(frozen, state.factors) if share >= 1 - settings.polish else None
                for batch in fresh(rounds, own):
                    rate = jnp.float32(settings.refit_rate * schedule(used()))
                    taught = teacher.read(batch)
                    remat = needs_remat(target.settings, taught.tokens.shape)
                    state = gradient_step(
                        target.settings, target.params, frozen, state, taught, rate, ends=target.ends, remat=remat
                    )
                    jax.block_until_ready(state)
                rounds += 1
                if rounds % _CHECK == 0 or used() >= 1:
                    joined = join_stacked(frozen, state.factors)
                    found = mean_kl(target, joined, held_out)
                    best = joined if found < min(history) else best
                    history.append(found)
                    bar.note = f"divergence {min(history):.3f}"
                bar.done = min(bar.total, rounds * ROUND if settings.refit else int(100 * used()))
                bar.update(0)
        except KeyboardInterrupt:
            stopped = True
    return Refitted(best, tuple(history), rounds * ROUND, stopped)


def schedule(share: float) -> float:
    """Give the rate at a share of the refit: a linear rise, then half a cosine down to 0."""
    if share < _WARM_UP:
        return (share + 1e-3) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def first_state(params: Params, settings: DistillSettings, seed: int) -> RefitState:
    """Initialise A at random with the bound of PEFT and B with zeros, for all modules."""
    rng, roles = np.random.default_rng([seed, 2]), {}
    for role, weight in params.weights.items():
        layers, rows, columns = weight.shape
        rank, bound = min(settings.refit_rank, rows, columns), columns**-0.5
        a = rng.uniform(-bound, bound, (layers, rank, columns)).astype(np.float32)
        roles[role] = StackedFactors(jnp.asarray(a), jnp.zeros((layers, rows, rank), jnp.float32))
    factors = StackedAdapter(roles)
    return RefitState(factors, _optimizer().init(jax.tree.leaves(factors)))


# The state is not donated: the best update and the one that writes share its arrays.
@partial(jax.jit, static_argnames=("settings", "ends", "remat"))
def gradient_step(
    settings: DecoderSettings,
    params: Params,
    frozen: StackedAdapter,
    state: RefitState,
    batch: TaughtBatch,
    rate: jax.Array,
    *,
    ends: int,
    remat: bool,
) -> RefitState:
    """Take a step of Adam on the weighted mean of KL(teacher || target) over a batch."""

    def loss(factors: StackedAdapter) -> jax.Array:
        joined = join_stacked(frozen, factors)
        student = shared_log_probs(settings, params, joined, batch.tokens, batch.mask, batch.at, ends=ends, remat=remat)
        total, weight = weighted_kl(batch.teacher, student, batch.weight)
        return total / weight

    leaves, structure = jax.tree.flatten(state.factors)
    gradient = jax.tree.leaves(jax.grad(loss)(state.factors))
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        changes, moments = _optimizer().update(gradient, state.moments)
    moved = [leaf - rate * change for leaf, change in zip(leaves, jax.tree.leaves(changes), strict=True)]
    return RefitState(structure.unflatten(moved), moments)


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam(*_DECAYS))
