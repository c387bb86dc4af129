"""Training loops for a LoRA adapter, an adapter's magnitudes, or any other differentiable part of a base."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, load_adapter, save_adapter, split_fused
from jcrosslora.adapter.folder import CHAT_TEMPLATE
from jcrosslora.checkpoint import (
    BaseModel,
    Tokenizer,
    describe_base,
    load_tokenizer,
    module_name,
    open_base,
    roles_named,
)
from jcrosslora.checkpoint.base import base_digest
from jcrosslora.decoder import Model, StackedAdapter, StackedFactors, load_model, stack_adapter
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.linalg import product_energy
from jcrosslora.text.reading import tokenizer_of
from jcrosslora.training import batches
from jcrosslora.training.batches import Batch, Plan, answer_loss
from jcrosslora.training.checkpoints import Checkpoints, TrainingSettings, check_folder
from jcrosslora.training.start import continued, fresh, to_adapter
from jcrosslora.utils.logs import record
from jcrosslora.utils.progress import track

Trained = TypeVar("Trained")
Magnitudes = dict[str, jax.Array]


def train_lora(
    base: BaseModel | str | Path | Any,
    examples: Sequence[Example] | str | Path,
    settings: TrainingSettings = TrainingSettings(),  # noqa: B008
    *,
    start: Adapter | str | Path | Any | None = None,
    checkpoints: str | Path | None = None,
    every: int = 20,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Adapter:
    """Train a LoRA adapter to give the right answers, with the mean loss over the answers' tokens.

    The same base, examples and settings give the same adapter on one kind of machine, even if the run was stopped and
    resumed from a checkpoint.

        adapter = jcl.train_lora("models/gemma-3-270m", "train.jsonl", jcl.TrainingSettings(rank=16))
        better = jcl.train_lora("models/gemma-3-270m", "more.jsonl", start=adapter)

    Args:
        base: an opened model, or whatever `open_base` opens; its weights do not change.
        examples: at least one, or a JSONL file of them (see `read_examples`). Conversations use the chat template that
            the user gave to `open_base`, else that of `start`, else the base's. The token that ends an answer is part
            of it.
        checkpoints: folder for the states of this run. If it holds states, the run resumes from the newest.
        every: steps between checkpoints; the last step always has one.
        model: the base in `settings.dtype`, if already loaded.
        tokenizer: the base's tokenizer, if already loaded.

    Returns:
        The adapter, in float32, its scale inside B.

    Raises:
        UsageError: settings out of range, no example, an answer without a token of its own, checkpoints of another run,
            a loss that is not finite, or a rank, alpha or modules that `start` does not have.
        AdapterError: `start` cannot be read, is not a plain LoRA, or is for another base.
        CheckpointError: the base, its tokenizer or a checkpoint cannot be read.
        OutputError: a checkpoint cannot be written.
    """
    settings.check()
    base, examples = _opened(base, examples)
    if start is None:
        begin = fresh(base, settings)
    else:
        start = load_adapter(start, base, replaced=True)
        begin = continued(base, start, settings)
        tokenizer = tokenizer or tokenizer_of(base, start.info.chat_template)

    @cache
    def loaded() -> Model:  # loaded at the first step: a finished run needs no model
        return model or load_model(base, settings.dtype)

    def gradient_of(factors: StackedAdapter, batch: Batch) -> tuple[jax.Array, StackedAdapter]:
        return batches.loss_and_gradient(loaded(), factors, batch, begin.scale, settings.remat)

    states = {"checkpoints": checkpoints, "every": every, "identity": begin.identity}
    factors = train(base, examples, settings, begin.factors, gradient_of, **states, tokenizer=tokenizer)
    return to_adapter(factors, begin.scale, base)


def fit_magnitudes(
    base: BaseModel | str | Path | Any,
    examples: Sequence[Example] | str | Path,
    adapter: Adapter,
    settings: TrainingSettings = TrainingSettings(rate=0.05),  # noqa: B008
    *,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Adapter:
    """Train the magnitude of every update of an adapter on examples; the directions do not change.

    It is the cheapest fit: a model of 30 layers has 210 numbers to train. They are trained relative to the adapter's
    original magnitudes, so `settings.rate` is a share of them per step, whatever their sizes.

    Args:
        base: an opened model, or whatever `open_base` opens.
        examples: at least one, or a JSONL file of them (see `read_examples`).
        adapter: an adapter for this base, such as one that was moved to it.
        settings: only updates of its `modules` are trained; its rank and alpha are not used.
        model: the base in `settings.dtype`, if already loaded.
        tokenizer: the base's tokenizer, if already loaded.

    Returns:
        The adapter with the new magnitudes inside B, which is float32 there; its updates of fused modules are split.

    Raises:
        UsageError: settings out of range, the optimiser "lora-rite" (it trains pairs of factors), an adapter without
            updates of the modules, or for the reasons of `train_lora`.
        AdapterError: the adapter does not fit the base.
        CheckpointError: the base or its tokenizer cannot be read.
    """
    settings.check()
    base, examples = _opened(base, examples)
    adapter = split_fused(adapter, base.fused)
    stacked = stack_adapter(adapter, base)
    modules = roles_named(settings.modules, stacked.roles)
    units = {role: norms for role, norms in first_magnitudes(stacked).items() if role in modules}
    if not any(np.any(norms) for norms in units.values()):
        msg = f"{adapter.info.name} has no update of {', '.join(modules)}: expected one whose magnitude to train"
        raise UsageError(msg)
    loaded = model or load_model(base, settings.dtype)
    tokenizer = tokenizer or tokenizer_of(base, adapter.info.chat_template)

    def gradient_of(shares: Magnitudes, batch: Batch) -> tuple[jax.Array, Magnitudes]:
        magnitudes = jax.tree.map(jnp.multiply, shares, units)
        loss, gradient = loss_and_magnitude_gradient(loaded, stacked, magnitudes, batch, settings.remat)
        return loss, jax.tree.map(jnp.multiply, gradient, units)

    start = jax.tree.map(jnp.ones_like, units)
    shares = train(base, examples, settings, start, gradient_of, tokenizer=tokenizer)
    return _rescaled(adapter, base, {role: np.asarray(values) for role, values in shares.items()})


def save_trained(
    adapter: Adapter,
    out: Path,
    base: BaseModel,
    made: Mapping[str, Any],
    *,
    overwrite: bool = False,
    chat_template: str | None = None,
) -> None:
    """Write a trained adapter as a PEFT folder, with `made` (how it was made) as JSON in the file's metadata.

    A chat template goes into the same folder, for later use or transfer. Raises OutputError if the folder exists
    already, or cannot be written.
    """
    save_adapter(
        adapter,
        out,
        base=describe_base(base, digest=base_digest(base)),
        metadata={"jcrosslora.training": json.dumps(made)},
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
    checkpoints: str | Path | None = None,
    every: int = 20,
    identity: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Trained:
    """Train any arrays by gradient descent; otherwise like `train_lora`, with the same errors.

    The settings must be checked already; rank, alpha and modules only matter to `gradient_of`, which returns the loss
    of a batch and its gradient with respect to the arrays. The arrays `start` are float32; they are donated. `identity`
    adds what else determines the numbers, and overrides settings of the same names.
    """
    if not examples or every < 1:
        raise UsageError(f"{len(examples)} examples with a checkpoint every {every} steps: expected 1 or more of both")
    tokenizer = tokenizer or load_tokenizer(base)
    encoded = [batches.encode(tokenizer, one, settings.loss) for one in examples]
    plan = Plan(encoded, settings.batch, settings.steps, settings.seed)
    state, kept = batches.first_state(start, settings), None
    if checkpoints is not None:
        checkpoints = Path(checkpoints)
        check_folder(checkpoints)
        # What the numbers of a run depend on.
        run = {**dataclasses.asdict(settings), "base": base.digest(), "examples": batches.digest(encoded)}
        kept = Checkpoints(checkpoints, run | dict(identity or {}))
    with nullcontext() if kept is None else kept.opened():
        state = state if kept is None else kept.restore(state)[0]
        begun = int(state.step)
        with track(settings.steps, "train", "steps", done=begun) as bar:
            for step in range(begun, settings.steps):
                loss, gradient = gradient_of(state.trained, plan.batch(step))
                if not math.isfinite(loss):
                    msg = f"{base.ref}: the loss is {float(loss)} at step {step}: lower the rate, which is "
                    raise UsageError(msg + f"{settings.rate:g}")
                state = batches.update(settings, state, gradient)
                record({"loss": float(loss)}, step + 1)
                bar.note = f"loss {float(loss):.3f}"
                bar.update()
                if kept is not None and ((step + 1) % every == 0 or step + 1 == settings.steps):
                    kept.save(state)
    return state.trained


def _opened(
    base: BaseModel | str | Path, examples: Sequence[Example] | str | Path
) -> tuple[BaseModel, Sequence[Example]]:
    base = open_base(base)
    return base, read_examples(examples) if isinstance(examples, str | Path) else examples


def first_magnitudes(adapter: StackedAdapter) -> Magnitudes:
    """Return the Frobenius norms ||dW|| of an adapter's updates: role -> float32 (L,), 0 for layers without one."""
    # A sum of products of two Gram matrices, which rounding can make negative.
    return {
        role: jnp.sqrt(jnp.maximum(jax.vmap(product_energy)(one.b, one.a), 0)) for role, one in adapter.roles.items()
    }


def with_magnitudes(adapter: StackedAdapter, magnitudes: Magnitudes) -> StackedAdapter:
    """Set the magnitudes of updates: each becomes m dW / ||dW||, after SD-LoRA (Wu et al., ICLR 2025).

    SD-LoRA divides by ||B|| ||A||, which depends on how the update is split into factors; this divides by ||B A||. The
    magnitudes m are float32 (L,) for each role; other roles keep theirs. An update of zero stays zero.
    """
    norms, roles = first_magnitudes(adapter), dict(adapter.roles)
    for role, magnitude in magnitudes.items():
        norm = norms[role]
        share = jnp.where(norm > 0, magnitude / jnp.where(norm > 0, norm, 1), 0)
        roles[role] = StackedFactors(adapter.roles[role].a, adapter.roles[role].b * share[:, None, None])
    return StackedAdapter(roles)


@partial(jax.jit, static_argnames="remat")
def loss_and_magnitude_gradient(
    model: Model, adapter: StackedAdapter, magnitudes: Magnitudes, batch: Batch, remat: bool = False
) -> tuple[jax.Array, Magnitudes]:
    """Compute `answer_loss` and its gradient with respect to the magnitudes.

    The adapter, with its scale inside B, gives the directions; the magnitudes are float32 (L,) for each role. `remat`
    recomputes each layer in the backward pass.
    """

    def loss(magnitudes: Magnitudes) -> jax.Array:
        return answer_loss(model.with_adapter(with_magnitudes(adapter, magnitudes)), batch, remat)

    return jax.value_and_grad(loss)(magnitudes)


def _rescaled(adapter: Adapter, base: BaseModel, shares: dict[str, np.ndarray]) -> Adapter:
    """Multiply B of each module by its share, (L,) for each role of L layers."""
    modules = dict(adapter.modules)
    for role, values in shares.items():
        for layer, share in zip(base.layers_with(role), values, strict=True):
            name = module_name(layer, role)
            if name in modules:
                modules[name] = dataclasses.replace(modules[name], b=np.asarray(modules[name].b, np.float32) * share)
    return dataclasses.replace(adapter, modules=modules)
