"""Whole trainings: of a LoRA adapter, or of anything else of a base that has a gradient."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax

from jcrosslora.adapter import Adapter, save_adapter
from jcrosslora.adapter.folder import CHAT_TEMPLATE
from jcrosslora.cache.store import base_digest
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.base import describe_base
from jcrosslora.checkpoint.tokenizer import Tokenizer, load_tokenizer
from jcrosslora.decoder import Model, StackedAdapter, load_model
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.training.batches import (
    Batch,
    Plan,
    TrainState,
    digest,
    encode,
    first_factors,
    first_state,
    loss_and_gradient,
    to_adapter,
    update,
)
from jcrosslora.training.checkpoints import Checkpoints, TrainingSettings, identity
from jcrosslora.utils.logs import record
from jcrosslora.utils.progress import track

Trained = TypeVar("Trained")


def train_lora(
    base: BaseModel | str | Path,
    examples: Sequence[Example] | str | Path,
    settings: TrainingSettings = TrainingSettings(),  # noqa: B008
    *,
    checkpoints: Path | None = None,
    every: int = 20,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Adapter:
    """Train a LoRA adapter to give the right answers, on the mean loss of the answers' tokens.

    The same base, examples and settings give the same adapter on one kind of machine, also when the run was stopped
    and continued from a checkpoint.

        adapter = jcl.train_lora("models/gemma-3-270m", "train.jsonl", jcl.TrainingSettings(rank=16))

    Args:
        base: the model, opened, or what `open_base` opens; its weights do not change.
        examples: at least one, or the JSONL file of them (see `read_examples`). Conversations are read in the base's
            chat template. The token that ends an answer is part of it.
        settings: of the training.
        checkpoints: folder for the states of this run. If it holds states, the run continues from the newest.
        every: steps from one checkpoint to the next; the last step always has one.
        model: the base in `settings.dtype`, if it is loaded already.
        tokenizer: of the base, if it is loaded already.

    Returns:
        The adapter, in float32, its scale inside B.

    Raises:
        UsageError: settings out of range, no example, an answer without a token of its own, checkpoints of another run,
            or a loss that is not finite.
        CheckpointError: the base, its tokenizer or a checkpoint cannot be read.
        OutputError: a checkpoint cannot be written.
    """
    settings.check()
    base = base if isinstance(base, BaseModel) else open_base(base)
    scale = settings.alpha / settings.rank

    @cache
    def loaded() -> Model:  # with the first step: a finished run needs none
        return model or load_model(base, settings.dtype)

    def gradient_of(factors: StackedAdapter, batch: Batch) -> tuple[jax.Array, StackedAdapter]:
        return loss_and_gradient(loaded(), factors, batch, scale, settings.remat)

    factors = train(
        base,
        read_examples(examples) if isinstance(examples, str | Path) else examples,
        settings,
        first_factors(base, settings),
        gradient_of,
        checkpoints=checkpoints,
        every=every,
        tokenizer=tokenizer,
    )
    return to_adapter(factors, settings, base)


def save_trained(
    adapter: Adapter,
    out: Path,
    base: BaseModel,
    settings: TrainingSettings,
    facts: dict[str, Any],
    *,
    overwrite: bool = False,
    chat_template: str | None = None,
) -> None:
    """Write a trained adapter as a PEFT folder, with the settings and facts of its training in the file's metadata.

    A chat template goes into the same folder, for those who use or move the adapter.

    Raises:
        OutputError: the folder exists already, or cannot be written.
    """
    save_adapter(
        adapter,
        out,
        base=describe_base(base, digest=base_digest(base)),
        metadata={"jcrosslora.training": json.dumps({**dataclasses.asdict(settings), **facts})},
        documents={} if chat_template is None else {CHAT_TEMPLATE: chat_template},
        overwrite=overwrite,
    )


def train(
    base: BaseModel,
    examples: Sequence[Example],
    settings: TrainingSettings,
    start: Trained,
    gradient_of: Callable[[Trained, Batch], tuple[jax.Array, Trained]],
    *,
    checkpoints: Path | None = None,
    every: int = 20,
    tokenizer: Tokenizer | None = None,
) -> Trained:
    """Train arrays by their gradient; otherwise as `train_lora`.

    The settings are checked already; rank, alpha and modules only matter to `gradient_of`, which returns the loss of a
    batch and its gradient with respect to the arrays. The arrays `start` are float32; they are used up.

    Returns:
        The arrays after the last step.

    Raises:
        UsageError: as `train_lora`; or the optimiser is lora-rite, and the arrays are not a `StackedAdapter`.
        CheckpointError, OutputError: see `train_lora`.
    """
    if not examples or every < 1:
        msg = f"{len(examples)} examples with a checkpoint every {every} steps: wanted 1 or more of both"
        raise UsageError(msg)
    tokenizer = tokenizer or load_tokenizer(base)
    encoded = [encode(tokenizer, one) for one in examples]
    plan = Plan(encoded, settings.batch, settings.steps, settings.seed)
    state = first_state(start, settings)
    kept = None
    if checkpoints is not None:
        kept = Checkpoints(checkpoints, identity(settings, base.digest(), digest(encoded)))
    with nullcontext() if kept is None else closing(kept):
        state = state if kept is None else kept.restore(state)[0]
        for state in _states(base, gradient_of, plan, settings, state):  # noqa: B020
            step = int(state.step)
            if kept is not None and (step % every == 0 or step == settings.steps):
                kept.save(state)
    return state.trained


def _states(
    base: BaseModel,
    gradient_of: Callable[[Trained, Batch], tuple[jax.Array, Trained]],
    plan: Plan,
    settings: TrainingSettings,
    state: TrainState,
) -> Iterator[TrainState]:
    """Yield the state after each remaining step; it is used up when the next one is asked for."""
    start = int(state.step)
    with track(settings.steps, "train", "steps", done=start) as bar:
        for step in range(start, settings.steps):
            loss, gradient = gradient_of(state.trained, plan.batch(step))
            if not math.isfinite(loss):
                came = f"the loss is {float(loss)} at step {step}"
                msg = f"{base.ref}: {came}: lower the rate, which is {settings.rate:g}"
                raise UsageError(msg)
            state = update(settings, state, gradient)
            record({"loss": float(loss)}, step + 1)
            bar.note = f"loss {float(loss):.3f}"
            bar.update()
            yield state
