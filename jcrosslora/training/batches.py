"""Batches of training examples, in few shapes and a seeded order, and the optimiser step on a batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import Model, StackedAdapter, StackedFactors, forward, target_log_probs
from jcrosslora.evaluate.examples import Example, as_completion
from jcrosslora.text import Reading, read
from jcrosslora.training.checkpoints import Loss, TrainingSettings
from jcrosslora.training.lora_rite import lora_rite

# One scale for all updates, or role -> float32 (L, 1, 1).
Scale: TypeAlias = float | jax.Array | dict[str, jax.Array]
_MULTIPLE = 16  # widths and answer slots are multiples of this: every further shape has to be compiled
_RARE = 1 / 16  # a width of fewer of the steps takes longer to compile than it saves
_WINDOW = 16  # batches within which examples are sorted by length
_LOGITS_AT_ONCE = 128


def encode(tokenizer: Tokenizer, example: Example, loss: Loss = "answers") -> Reading:
    """Tokenize a prompt and its right answer; raise the errors of `jcrosslora.text.read`.

    With the loss on all tokens, the answer begins at the second token: nothing predicts the first one.
    """
    found = read(tokenizer, as_completion(example))
    return found if loss == "answers" else replace(found, answer=1)


def digest(examples: Sequence[Reading]) -> str:
    """Return the SHA-256 (hex) of the tokens of all examples in their order."""
    found = hashlib.sha256()
    for example in examples:
        found.update(np.array([len(example.ids), example.answer], "<i8").tobytes())
        found.update(example.ids.astype("<i4").tobytes())
    return found.hexdigest()


@flax.struct.dataclass
class Batch:
    """Examples padded on the right: tokens int32 and mask bool (B, T); S slots for answer tokens.

    Attributes:
        picked: int32 (S,), index into the flattened (B, T) of the position before each answer token.
        wanted: int32 (S,), the answer tokens.
        used: float32 (S,), 1 for a token, 0 for an empty slot.
        members: int32 (B,), the index of each example.
    """

    tokens: jax.Array
    mask: jax.Array
    picked: jax.Array
    wanted: jax.Array
    used: jax.Array
    members: jax.Array


class Plan:
    """All batches of a run, fixed from the start, so that a run can resume at any step.

    Each epoch is a new permutation of the examples. Within every 16 batches, examples of similar length share a batch,
    which reduces padding; the order of these batches is shuffled again.
    """

    def __init__(self, examples: Sequence[Reading], batch: int, steps: int, seed: int):
        """Decide the order of `steps` batches of `batch` examples each."""
        self._examples = examples
        lengths, answers = np.array([(len(one.ids), one.answer_tokens) for one in examples]).T
        self.members = _order(lengths, batch, steps, seed)
        self.widths = _widths(lengths[self.members].max(axis=1))
        found = answers[self.members].sum(axis=1)
        self._slots = {int(width): rounded(found[self.widths == width].max()) for width in np.unique(self.widths)}

    def batch(self, step: int) -> Batch:
        """Make the batch of a step, counted from 0."""
        width = int(self.widths[step])
        return make_batch(self._examples, self.members[step], width, self._slots[width])


def make_batch(examples: Sequence[Reading], members: np.ndarray, width: int, slots: int) -> Batch:
    """Pad the examples at the indices `members`, int (B,), to `width` T and `slots` S for all answers."""
    tokens, mask = np.zeros((len(members), width), np.int32), np.zeros((len(members), width), bool)
    picked = np.zeros(slots, np.int32)
    wanted, used = np.zeros_like(picked), np.zeros(picked.shape, np.float32)
    filled = 0
    for row, one in enumerate(examples[index] for index in members):
        tokens[row, : len(one.ids)], mask[row, : len(one.ids)] = one.ids, True
        place = slice(filled, filled + one.answer_tokens)
        picked[place] = row * width + np.arange(one.answer - 1, len(one.ids) - 1)
        wanted[place], used[place] = one.ids[one.answer :], 1
        filled += one.answer_tokens
    return Batch(*map(jnp.asarray, (tokens, mask, picked, wanted, used, members.astype(np.int32))))


def _order(lengths: np.ndarray, batch: int, steps: int, seed: int) -> np.ndarray:
    """Return the example indices of each batch, int64 (steps, batch)."""
    rng, total = np.random.default_rng(seed), steps * batch
    passes = [rng.permutation(len(lengths)) for _ in range(-(-total // len(lengths)))]
    order = np.concatenate(passes)[:total]
    window = _WINDOW * batch
    for start in range(0, total, window):
        part = order[start : start + window]
        by_length = part[np.argsort(lengths[part], kind="stable")].reshape(-1, batch)
        order[start : start + window] = rng.permutation(by_length).reshape(-1)
    return order.reshape(steps, batch)


def _widths(lengths: np.ndarray) -> np.ndarray:
    """Return the width of each batch, int64 (steps,), given its longest text; round rare widths up to the next."""
    widths = np.array([rounded(length) for length in lengths])
    for width in np.unique(widths)[:-1]:
        here = widths == width
        if here.sum() < _RARE * len(widths):
            widths[here] = widths[widths > width].min()
    return widths


def rounded(length: int) -> int:
    """Round a width or a number of slots up, so that few shapes are compiled."""
    return -(-int(length) // _MULTIPLE) * _MULTIPLE


@flax.struct.dataclass
class TrainState:
    """The state of a training between two updates.

    Attributes:
        trained: arrays in float32; for a LoRA, A and B of every role, without the scale.
        step: int32 scalar, number of updates so far.
    """

    trained: Any
    optimizer: Any
    step: jax.Array


def rate_at(settings: TrainingSettings) -> optax.Schedule:
    """Make the learning rate schedule: linear warm-up, then cosine decay to 0; steps count from 0."""

    def rate(step: Any) -> Any:
        rise = (step + 1) / (settings.warm_up + 1)
        done = (step - settings.warm_up) / (settings.steps - settings.warm_up)
        return settings.rate * jnp.where(step < settings.warm_up, rise, (1 + jnp.cos(jnp.pi * done)) / 2)

    return rate


def _optimizer(settings: TrainingSettings) -> optax.GradientTransformation:
    """Make the optimiser: AdamW with clipping by global norm, or LoRA-RITE, which clips inside."""
    rate, decay = rate_at(settings), settings.weight_decay
    if settings.optimizer == "lora-rite":
        return lora_rite(rate, clip=settings.clip, weight_decay=decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip), optax.adamw(rate, weight_decay=decay))


def first_state(trained: Any, settings: TrainingSettings) -> TrainState:
    """Make the state before the first update; raise UsageError if the optimiser cannot train these arrays."""
    return TrainState(trained, _optimizer(settings).init(trained), jnp.zeros((), jnp.int32))


def answer_loss(model: Model, batch: Batch, remat: bool = False) -> jax.Array:
    """Compute the mean of -log p(token) over the batch's answer tokens: float32 scalar, nats.

    Only the positions before answer tokens go through the head: in Gemma-3-270M it has more weights than all layers
    together. An adapter of the model has the scale inside B. `remat` recomputes each layer in the backward pass.
    """
    hidden = forward(model, batch.tokens, mask=batch.mask, remat=remat).hidden
    states = hidden.reshape(-1, hidden.shape[-1])[batch.picked]
    found = target_log_probs(model, states[None], batch.wanted[None], chunk=_LOGITS_AT_ONCE)[0]
    return -jnp.sum(found * batch.used) / jnp.sum(batch.used)


@partial(jax.jit, static_argnames="remat")
def loss_and_gradient(
    model: Model, factors: StackedAdapter, batch: Batch, scale: Scale, remat: bool = False
) -> tuple[jax.Array, StackedAdapter]:
    """Compute `answer_loss` and its gradient with respect to the factors; compiled once for each shape of a batch.

    The model is the base alone; the factors exclude the scale, alpha / rank. `remat` recomputes each layer in the
    backward pass.
    """

    def loss(factors: StackedAdapter) -> jax.Array:
        return answer_loss(model.with_adapter(scaled(factors, scale)), batch, remat)

    return jax.value_and_grad(loss)(factors)


# Compiled separately from the gradient, because it is the same for all batch shapes.
@partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(settings: TrainingSettings, state: TrainState, gradient: Any) -> TrainState:
    """Update the state; the given one is donated."""
    # optax relies on it, and the calling program may have set "strict".
    with jax.numpy_dtype_promotion("standard"):
        changes, optimizer = _optimizer(settings).update(gradient, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, changes)
    return TrainState(trained, optimizer, state.step + 1)


def scaled(factors: StackedAdapter, scale: Scale) -> StackedAdapter:
    """Multiply B by the scale, as the decoder expects."""
    times = scale if isinstance(scale, dict) else dict.fromkeys(factors.roles, jnp.asarray(scale, jnp.float32))
    return StackedAdapter({role: StackedFactors(one.a, one.b * times[role]) for role, one in factors.roles.items()})
