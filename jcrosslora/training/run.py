"""A whole training: from a base and examples to an adapter, or to whatever else of a base is trained."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import jax

from jcrosslora.adapter import Adapter
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Params, StackedAdapter, load_params, settings_of
from jcrosslora.errors import UsageError
from jcrosslora.evaluate import Question
from jcrosslora.training.batches import Batch, Plan
from jcrosslora.training.checkpoints import Checkpoints, identity
from jcrosslora.training.examples import Encoded, digest, encode
from jcrosslora.training.factors import first_factors, to_adapter
from jcrosslora.training.settings import TrainSettings
from jcrosslora.training.step import TrainState, first_state, loss_and_gradient, update
from jcrosslora.utils.progress import track

Trained = TypeVar("Trained")


def train_lora(
    base: BaseModel,
    examples: Sequence[Question],
    settings: TrainSettings,
    *,
    checkpoints: Path | None = None,
    every: int = 20,
    progress: bool = False,
    params: Params | None = None,
    tokenizer: Tokenizer | None = None,
) -> Adapter:
    """Train a LoRA adapter to give the right answers: AdamW on the mean loss of the answers' tokens.

    The same base, examples and settings give the same adapter on one kind of machine, also when the run was stopped
    and went on from a checkpoint.

    Args:
        base: the model; its weights do not change.
        examples: at least one; only the right choice of each is used, behind its prompt. `Prompted` ones have a prompt
            of their own.
        settings: of the training.
        checkpoints: folder for the states of this run. If there are states in it, the run goes on from the newest.
        every: steps from one checkpoint to the next; there is one behind the last step as well.
        progress: whether to show a progress bar with the loss.
        params: the weights in `settings.dtype`, where they are loaded already.
        tokenizer: the base's, where it is loaded already.

    Returns:
        The adapter, in float32, its scale inside B.

    Raises:
        UsageError: settings that make no sense, no example, an answer without a token of its own, checkpoints of
            another run, or a loss that is not finite.
        CheckpointError: the base, its tokenizer or a checkpoint cannot be read.
        OutputError: a checkpoint cannot be written.
    """
    settings.check()
    model, scale = settings_of(base), settings.alpha / settings.rank

    @cache
    def weights() -> Params:  # not before a step has to be made
        return load_params(base, settings.dtype) if params is None else params

    def gradient(factors: StackedAdapter, batch: Batch) -> tuple[jax.Array, StackedAdapter]:
        return loss_and_gradient(model, weights(), factors, batch, scale, settings.remat)

    factors = train(
        base,
        examples,
        settings,
        first_factors(base, settings),
        gradient,
        checkpoints=checkpoints,
        every=every,
        progress=progress,
        tokenizer=tokenizer,
    )
    return to_adapter(factors, settings, base)


def train(
    base: BaseModel,
    examples: Sequence[Question],
    settings: TrainSettings,
    started: Trained,
    gradient: Callable[[Trained, Batch], tuple[jax.Array, Trained]],
    *,
    checkpoints: Path | None = None,
    every: int = 20,
    progress: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Trained:
    """Train what `gradient` is the gradient of, for the given examples; otherwise as `train_lora`.

    Args:
        base: the model.
        examples: see `train_lora`.
        settings: of the training, checked; what is trained decides whether rank, alpha and modules have a meaning.
        started: arrays in float32, in front of the first step. They are used up.
        gradient: the loss of a batch, and its gradient with respect to these arrays.
        checkpoints: see `train_lora`.
        every: see `train_lora`.
        progress: see `train_lora`.
        tokenizer: see `train_lora`.

    Returns:
        The arrays behind the last step.

    Raises:
        UsageError, CheckpointError, OutputError: see `train_lora`.
    """
    if not examples or every < 1:
        msg = f"{len(examples)} examples with a checkpoint every {every} steps: wanted 1 or more of both"
        raise UsageError(msg)
    tokenizer = tokenizer or load_tokenizer(base)
    encoded = [encode(tokenizer, one) for one in examples]
    plan = Plan(encoded, settings.batch, settings.steps, settings.seed)
    state = first_state(started, settings)
    with _opened(checkpoints, base, encoded, settings) as kept:
        state = state if kept is None else kept.restore(state)
        for state in _states(base, gradient, plan, settings, state, progress):  # noqa: B020
            step = int(state.step)
            if kept is not None and (step % every == 0 or step == settings.steps):
                kept.save(state)
    return state.trained


def _states(
    base: BaseModel,
    gradient: Callable[[Trained, Batch], tuple[jax.Array, Trained]],
    plan: Plan,
    settings: TrainSettings,
    state: TrainState,
    progress: bool,
) -> Iterator[TrainState]:
    """The state behind every further step; it is used up when the next one is asked for."""
    start = int(state.step)
    with track(settings.steps, "train", "steps", show=progress, done=start) as bar:
        for step in range(start, settings.steps):
            batch = plan.batch(step)
            loss, gradient = gradient(state.trained, batch)
            if not math.isfinite(loss):
                msg = (
                    f"{base.ref}: the loss is {float(loss)} at step {step}: lower the rate, which is {settings.rate:g}"
                )
                raise UsageError(msg)
            state = update(settings, state, gradient)
            bar.note = f"loss {float(loss):.3f}"
            bar.update()
            yield state


@contextmanager
def _opened(
    folder: Path | None, base: BaseModel, encoded: Sequence[Encoded], settings: TrainSettings
) -> Iterator[Checkpoints | None]:
    if folder is None:
        yield None
        return
    with closing(Checkpoints(folder, identity(settings, base.digest(), digest(encoded)))) as opened:
        yield opened
