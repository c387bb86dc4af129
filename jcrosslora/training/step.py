"""One update: the loss of a batch's answers, its gradient, and the optimiser of the factors that are trained."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcrosslora.adapter import Adapter, AdapterInfo
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import Model, StackedAdapter, StackedFactors, forward, target_log_probs, unstack_adapter
from jcrosslora.errors import UsageError
from jcrosslora.training.batches import Batch
from jcrosslora.training.lora_rite import lora_rite
from jcrosslora.training.settings import TrainingSettings

_LOGITS_AT_ONCE = 128


@flax.struct.dataclass
class TrainState:
    """The state of a training between two updates.

    Attributes:
        trained: the trained arrays, in float32; of a LoRA A and B of every role, without the scale.
        optimizer: state of `optimizer_of`.
        step: int32 scalar, updates made.
    """

    trained: Any
    optimizer: Any
    step: jax.Array


def rate_at(settings: TrainingSettings) -> optax.Schedule:
    """Make the schedule of the learning rate: a linear rise, then half a cosine down to 0; steps count from 0."""

    def rate(step: Any) -> Any:
        rise = (step + 1) / (settings.warm_up + 1)
        done = (step - settings.warm_up) / (settings.steps - settings.warm_up)
        return settings.rate * jnp.where(step < settings.warm_up, rise, (1 + jnp.cos(jnp.pi * done)) / 2)

    return rate


def optimizer_of(settings: TrainingSettings) -> optax.GradientTransformation:
    """Make the optimiser: AdamW behind a clip of the gradient's norm, or LoRA-RITE, which clips inside."""
    rate = rate_at(settings)
    if settings.optimizer == "lora-rite":
        return lora_rite(rate, clip=settings.clip, weight_decay=settings.weight_decay)
    adam = optax.adamw(rate, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip), adam)


def first_state(trained: Any, settings: TrainingSettings) -> TrainState:
    """Make the state before the first update.

    Raises:
        UsageError: the optimiser is of LoRA factors, and the arrays are others.
    """
    return TrainState(trained, optimizer_of(settings).init(trained), jnp.zeros((), jnp.int32))


def answer_loss(model: Model, batch: Batch, remat: bool = False) -> jax.Array:
    """Compute the mean of -log p(token) over the batch's answer tokens: float32 scalar, nats.

    Only the positions in front of answer tokens go through the head: in Gemma-3-270M it has more weights than all
    layers together.

    Args:
        model: the base with the adapter, the scale inside B, or alone.
        batch: the examples.
        remat: recompute each layer in the backward pass.
    """
    hidden = forward(model, batch.tokens, mask=batch.mask, remat=remat).hidden
    states = hidden.reshape(-1, hidden.shape[-1])[batch.picked]
    found = target_log_probs(model, states[None], batch.wanted[None], chunk=_LOGITS_AT_ONCE)[0]
    return -jnp.sum(found * batch.used) / jnp.sum(batch.used)


@partial(jax.jit, static_argnames="remat")
def loss_and_gradient(
    model: Model, factors: StackedAdapter, batch: Batch, scale: float | jax.Array, remat: bool = False
) -> tuple[jax.Array, StackedAdapter]:
    """Compute `answer_loss` and its gradient with respect to the factors; compiled once for each shape of a batch.

    Args:
        model: the base alone.
        factors: A and B, without the scale.
        batch: the examples.
        scale: alpha / rank.
        remat: recompute each layer in the backward pass.
    """

    def loss(factors: StackedAdapter) -> jax.Array:
        return answer_loss(model.with_adapter(scaled(factors, scale)), batch, remat)

    return jax.value_and_grad(loss)(factors)


# Compiled apart from the gradient, because it is the same for batches of all shapes.
@partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(settings: TrainingSettings, state: TrainState, gradient: Any) -> TrainState:
    """Update the state; the given one is used up."""
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # optax relies on it, and a program around this one may have set "strict"
        changes, optimizer = optimizer_of(settings).update(gradient, state.optimizer, state.trained)
    trained = optax.apply_updates(state.trained, changes)
    return TrainState(trained, optimizer, state.step + 1)


def first_factors(base: BaseModel, settings: TrainingSettings) -> StackedAdapter:
    """Initialise A uniformly in +-1/sqrt(I), Kaiming's bound as in PEFT, and B with zeros: training starts at the base.

    The scale is not inside B: the steps of neither optimiser scale with it.

    Raises:
        UsageError: the base has none of the modules.
    """
    rng = np.random.default_rng([settings.seed, 1])
    shapes = base.architecture.role_shapes
    asked = tuple(shapes) if settings.modules is None else settings.modules
    wanted = [role for role in asked if role in shapes]
    if not wanted:
        msg = f"modules {', '.join(asked)}: {base.name} has none of them, only "
        raise UsageError(msg + ", ".join(shapes))
    roles = {}
    for role in wanted:
        layers, (rows, columns) = len(base.layers_with(role)), shapes[role]
        bound = columns**-0.5
        a = rng.uniform(-bound, bound, (layers, settings.rank, columns)).astype(np.float32)
        roles[role] = StackedFactors(jnp.asarray(a), jnp.zeros((layers, rows, settings.rank), jnp.float32))
    return StackedAdapter(roles)


def scaled(factors: StackedAdapter, scale: float | jax.Array) -> StackedAdapter:
    """Multiply B by the scale, as the decoder wants it."""
    roles = {
        role: StackedFactors(one.a, one.b * jnp.asarray(scale, jnp.float32)) for role, one in factors.roles.items()
    }
    return StackedAdapter(roles)


def to_adapter(factors: StackedAdapter, settings: TrainingSettings, base: BaseModel) -> Adapter:
    """Make an adapter of the factors, the scale inside B."""
    host = jax.device_get(scaled(factors, settings.alpha / settings.rank))
    return Adapter(
        unstack_adapter(host, base).modules, AdapterInfo(f"trained on {base.name}", base.name, prefix=base.prefix)
    )
