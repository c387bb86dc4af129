"""The fit: gradient steps on the factors of all modules, with several passes over the completions.

Writing a completion and computing the teacher's predictions takes longer than a step, so another pass is cheaper than
new completions. Late in a long fit the target writes the answers with its update, and the teacher corrects it
(on-policy distillation: Agarwal et al. 2024, arXiv 2306.13649). The update with the lowest divergence on held-out
completions, measured every few batches, is kept.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcrosslora.checkpoint import ROLES, roles_named
from jcrosslora.decoder import Model, StackedAdapter, StackedFactors, join_stacked
from jcrosslora.distill.batches import FIT_ROWS, DistillationBatch, most_kept, needs_remat
from jcrosslora.distill.completions import round_cost
from jcrosslora.distill.judge import Judge
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.distill.sources.decoder import RestrictedModel, shared_log_probs
from jcrosslora.distill.states import FitStates
from jcrosslora.distill.teacher import TaughtBatch, Teacher, weighted_kl
from jcrosslora.utils.cost import TEXT, Cost, free_memory
from jcrosslora.utils.logs import record
from jcrosslora.utils.progress import Track, track

EVAL_EVERY = 24  # batches between two evaluations on the held-out completions
_WARM_UP = 0.05  # share of the fit over which the rate rises


def _adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, 0.9, 0.99))


# Its state holds the rate, which follows the share of the fit and not the number of steps.
_ADAM = optax.inject_hyperparams(_adam)(rate=0.0)
# Writes a round's completions; the target answers with the given update, or the source if that is None.
BatchSource = Callable[[int, StackedAdapter | None], Sequence[DistillationBatch]]


@flax.struct.dataclass
class FitState:
    """What changes from step to step; the best factors are those with the lowest divergence so far."""

    step: jax.Array
    factors: StackedAdapter
    optimizer: Any
    best: StackedAdapter


@dataclass(frozen=True)
class EvalPoint:
    """An evaluation on the held-out completions.

    Attributes:
        seconds: since the beginning, writing and reading completions included.
        completions: used so far.
        divergence: KL(teacher || target with the update), nats a position.
        agreed: how many of the source's `held_out` greedy answers the target would also write.
    """

    seconds: float
    completions: int
    divergence: float
    agreed: int
    held_out: int


@dataclass(frozen=True, eq=False)
class Fitted:
    """The update that is best on the held-out completions, with the update it started from, and all evaluations.

    Attributes:
        new_completions: completions of further rounds, without labelled examples.
        own: how many of these the target wrote.
        done: share of the planned fit, below 1 if Ctrl-C ended it.
    """

    adapter: StackedAdapter
    curve: tuple[EvalPoint, ...]
    new_completions: int
    own: int
    steps: int
    done: float


def fit_cost(settings: DistillSettings, prompts: int = 0, examples: int = 0) -> Cost:
    """Count a fit to given prompts and labelled examples, with the completions of its further rounds."""
    prompted = prompts + examples > 0
    course = settings.course(prompted=prompted)
    first, new_completions, passes = course.first, sum(course.rounds[1:]), course.passes
    # The training and the held-out batches each end with a half-full batch in a few widths.
    judging = settings.held_of(first, prompted=prompted)
    held, used = judging + 2 * FIT_ROWS, first - judging + 2 * FIT_ROWS + new_completions
    evaluations = 1 + passes * used / FIT_ROWS / EVAL_EVERY
    source, target = 2 * (used + held), used + (1 + evaluations) * held
    read = Cost(source=TEXT * source, target=TEXT * target, stepped=TEXT * passes * used)
    labelled = TEXT * examples * course.repeats
    read += Cost(source=2 * labelled, target=labelled, stepped=passes * labelled)
    further = [round_cost(settings.answer_tokens, prompts + examples)] * (len(course.rounds) - 1)
    return sum(further, read)


class Fit:
    """A fit of an update of the target to the teacher: its state, and how far it has come.

    Args:
        teacher: with the target in it.
        judge: measures updates on held-out completions.
        prompted: whether the prompts came from the user.
        start: a fixed update of the target, on top of which factors are trained.
        begun: `time.monotonic()` at the start of the budget.
        seed: of the first factors, and of the order of batches.
    """

    def __init__(
        self,
        teacher: Teacher,
        judge: Judge,
        settings: DistillSettings,
        start: StackedAdapter | None = None,
        *,
        prompted: bool = False,
        begun: float,
        seed: int = 0,
    ) -> None:
        self._teacher, self._judge, self._settings = teacher, judge, settings
        self._start, self._begun, self._seed = start, begun, seed
        self._most_kept, self._most_remembered = most_kept(free_memory())
        self._course = settings.course(prompted=prompted)
        self._state = first_state(teacher.target.model, settings, seed)
        self._rounds, self._new_completions, self._own, self._used, self._part, self._seen = 0, 0, 0, 0, 0.0, 0
        self._curve = [self._measure()]

    def run(self, first: Sequence[DistillationBatch], fresh: BatchSource, states: FitStates | None = None) -> Fitted:
        """Train until the completions or the time are used up; Ctrl-C ends the fit with the best update so far.

        Args:
            first: the batches written before the fit; they are always used, and used first.
            fresh: writes the completions of further rounds.
            states: where the state is saved after each round; a fit continues from the newest one.
        """
        settings, done = self._settings, 1.0
        if states is not None:
            self._restore(states)
        total, unit = (100, "%") if settings.seconds is not None else (sum(self._course.rounds), "completions")
        with track(total, "fit", unit) as bar:
            try:
                while self._share() < 1:
                    polishes = self._rounds > 0 and self._share() >= 1 - settings.polish
                    own = self._joined(self._state.factors) if polishes else None
                    self._use(fresh(self._rounds, own) if self._rounds else first, bar, own=polishes)
                    if states is not None:
                        self._save(states)
                self._evaluate(bar)  # the time may have ended while a state was saved
            except KeyboardInterrupt:
                done = min(1.0, self._share())
                self._evaluate(bar)
        curve, steps = tuple(self._curve), int(self._state.step)
        return Fitted(self._joined(self._state.best), curve, self._new_completions, self._own, steps, done)

    def _joined(self, factors: StackedAdapter) -> StackedAdapter:
        return factors if self._start is None else join_stacked(self._start, factors)

    def _share(self) -> float:
        """Return the share of the budget, or of the rounds, that is used."""
        if self._settings.seconds is not None:
            used = self._seconds() / self._settings.seconds
            # Writing the first completions may take longer than the budget: they are used anyway.
            return used if self._rounds else min(used, self._part)
        sizes = self._course.rounds
        return 1.0 if self._rounds >= len(sizes) else sum(sizes[: self._rounds]) / sum(sizes) + self._part

    def _use(self, batches: Sequence[DistillationBatch], bar: Track, *, own: bool) -> None:
        """Take the steps of a round in random order, because the batches arrive sorted by width.

        The bar counts the first step on a batch twice: the teacher reads it then, which takes about as long as a step.
        """
        target, settings = self._teacher.target.with_adapter(self._start), self._settings
        sizes = self._course.rounds
        size = sizes[self._rounds] / sum(sizes) if settings.seconds is None else 1.0
        before, read = self._share(), _remembering(self._teacher, batches, self._most_remembered)
        rng = np.random.default_rng([self._seed, 3, self._rounds])
        order = np.concatenate([rng.permutation(len(batches)) for _ in range(self._course.passes)])
        for place, index in enumerate(order.tolist()):
            if self._share() >= 1:
                break
            batch, first = batches[index], place < len(batches)
            rate = jnp.float32(self._course.rate * schedule(self._share()))
            remat = needs_remat(target.model.settings, batch.tokens_tgt.shape, self._most_kept)
            state = gradient_step(target, self._state, read(index), rate, remat=remat)
            self._state = jax.block_until_ready(state)
            self._used += batch.rows * first
            written = (batch.rows - batch.labelled) * first
            self._own += written * own
            self._new_completions += written * (self._rounds > 0)
            self._part = size * (place + 1) / len(order)
            if int(self._state.step) % EVAL_EVERY == 0:
                self._evaluate(bar)
            worked = (1 + place + min(1 + place, len(batches))) / (len(order) + len(batches))
            done = before + size * worked if settings.seconds is None else self._share()
            bar.update(int(bar.total * done) - bar.done)
        self._rounds, self._part = self._rounds + 1, 0.0
        if self._share() >= 1:
            self._evaluate(bar)

    def _evaluate(self, bar: Track) -> None:
        """Measure the update on the held-out completions if any step was taken since, and keep it if it is the best."""
        if self._seen == int(self._state.step):
            return
        self._seen, found = int(self._state.step), self._measure()
        if found.divergence < min(point.divergence for point in self._curve):
            self._state = replace(self._state, best=self._state.factors)
        self._curve.append(found)
        best = min(self._curve, key=lambda point: point.divergence)
        agreed = f", {best.agreed} of {best.held_out} answers" if best.held_out else ""
        bar.note = f"divergence {best.divergence:.3f}{agreed}"

    def _measure(self) -> EvalPoint:
        student = self._teacher.target.with_adapter(self._joined(self._state.factors))
        point = EvalPoint(self._seconds(), self._used, *self._judge.judge(student))
        figures = {"divergence": point.divergence, "completions": point.completions}
        agreement = {"agreement": point.agreed / point.held_out} if point.held_out else {}
        record({**figures, **agreement}, self._seen)
        return point

    def _restore(self, states: FitStates) -> None:
        """Continue from the newest saved state, if there is one."""
        self._state, notes = states.restore(self._state)
        if notes:
            self._rounds, self._new_completions, self._own = notes["rounds"], notes["anew"], notes["own"]
            self._used = notes["used"]
            self._curve = [EvalPoint(*point) for point in notes["looks"]]
            self._begun, self._seen = time.monotonic() - notes["seconds"], notes["seen"]

    def _save(self, states: FitStates) -> None:
        curve = [astuple(point) for point in self._curve]
        progress = {"rounds": self._rounds, "anew": self._new_completions, "own": self._own}
        progress |= {"used": self._used, "seen": self._seen}
        states.save(self._state, {**progress, "seconds": self._seconds(), "looks": curve})

    def _seconds(self) -> float:
        return time.monotonic() - self._begun


def _remembering(teacher: Teacher, batches: Sequence[DistillationBatch], most: int) -> Callable[[int], TaughtBatch]:
    """Return a reader that caches up to `most` bytes of teacher predictions."""
    kept: dict[int, TaughtBatch] = {}
    size = 0

    def read(index: int) -> TaughtBatch:
        nonlocal size
        if index in kept:
            return kept[index]
        found = teacher.read(batches[index])
        size += found.teacher.nbytes
        if size <= most:
            kept[index] = found
        return found

    return read


def schedule(share: float) -> float:
    """Return the learning rate at a share of the fit: a linear rise, then a cosine decay to 0."""
    if share < _WARM_UP:
        return (share + 1e-3) / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def first_state(target: Model, settings: DistillSettings, seed: int = 0) -> FitState:
    """Initialise A randomly with PEFT's bound and B with zeros, in the modules of the settings."""
    rng, roles, weights = np.random.default_rng([seed, 2]), {}, target.params.weights
    for role in roles_named(settings.roles, [role for role in ROLES if role in weights]):
        layers, rows, columns = weights[role].shape
        rank, bound = min(settings.fit_rank, rows, columns), columns**-0.5
        a = jnp.asarray(rng.uniform(-bound, bound, (layers, rank, columns)).astype(np.float32))
        roles[role] = StackedFactors(a, jnp.zeros((layers, rows, rank), jnp.float32))
    factors: Any = StackedAdapter(roles)
    zeros = jax.tree.map(jnp.zeros_like, factors)
    return FitState(jnp.zeros((), jnp.int32), factors, _ADAM.init(factors), zeros)


# The state is not donated: the best update and the one that writes share its arrays.
@partial(jax.jit, static_argnames="remat")
def gradient_step(
    target: RestrictedModel, state: FitState, batch: TaughtBatch, rate: jax.Array, *, remat: bool
) -> FitState:
    """Take a step on the weighted mean of KL(teacher || target) over a batch; the target's own adapter stays fixed."""
    start: Any = target.model.adapter

    def loss(factors: StackedAdapter) -> jax.Array:
        student = target.with_adapter(factors if start is None else join_stacked(start, factors))
        found = shared_log_probs(student, batch.tokens, batch.mask, batch.at, remat=remat)
        total, weight = weighted_kl(batch.teacher, found, batch.weight)
        return total / weight

    # optax's types know arrays and not trees of them.
    factors: Any = state.factors
    gradient: Any = jax.grad(loss)(factors)
    moments = state.optimizer._replace(hyperparams={**state.optimizer.hyperparams, "rate": rate})
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        changes, moments = _ADAM.update(gradient, moments, factors)
        factors = optax.apply_updates(factors, changes)
    return FitState(state.step + 1, factors, moments, state.best)
