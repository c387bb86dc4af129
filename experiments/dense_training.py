"""Further training of all weights of a base's modules, without low rank, as most further-trained models were made."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors
from jcrosslora.architectures.blocks import ROLE_PATHS
from jcrosslora.checkpoint import BaseModel
from jcrosslora.decoder import Model, load_model
from jcrosslora.evaluate import Question
from jcrosslora.training import TrainingSettings
from jcrosslora.training.batches import Batch, answer_loss
from jcrosslora.training.run import train

_EVERY = 80  # steps between checkpoints, which hold three times the weights


def train_dense(
    base: BaseModel,
    examples: Sequence[Question],
    settings: TrainingSettings,
    *,
    checkpoints: Path | None = None,
) -> Adapter:
    """Train the weights of `settings.modules` as `jcrosslora.training.train_lora` trains factors.

    Args:
        base: the model; its files do not change.
        examples: see `train_lora`.
        settings: of the training; rank, alpha, dtype (always float32) and remat are not used.
        checkpoints: folder for the states of this run.

    Returns:
        The exact change of each weight as an adapter of full rank, which can be merged.

    Raises:
        UsageError, CheckpointError, OutputError: see `train_lora`.
    """
    settings.check()
    model = load_model(base)
    params = model.params
    start = {role: jnp.array(params.weights[role]) for role in settings.modules or params.weights}

    def gradient_of(weights: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return _loss_and_gradient(model, weights, batch)

    found = train(base, examples, settings, start, gradient_of, checkpoints=checkpoints, every=_EVERY)
    modules = {}
    for role, weights in found.items():
        for layer, change in enumerate(np.asarray(weights) - np.asarray(params.weights[role])):
            modules[f"model.layers.{layer}.{ROLE_PATHS[role]}"] = _whole(change)
    return Adapter(modules, AdapterInfo(name=f"trained on {base.name}", base_name=base.name))


def _whole(change: np.ndarray) -> LoRAFactors:
    """Factor a matrix (O, I) as b @ a without rounding: the identity of the shorter side and the matrix itself."""
    rows, columns = change.shape
    if rows <= columns:
        return LoRAFactors(a=change, b=np.eye(rows, dtype=np.float32))
    return LoRAFactors(a=np.eye(columns, dtype=np.float32), b=change)


@jax.jit
def _loss_and_gradient(
    model: Model, weights: dict[str, jax.Array], batch: Batch
) -> tuple[jax.Array, dict[str, jax.Array]]:
    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        params = dataclasses.replace(model.params, weights={**model.params.weights, **weights})
        return answer_loss(dataclasses.replace(model, params=params), batch)

    return jax.value_and_grad(loss)(weights)
