"""Decoupled magnitudes: the directions of an adapter's updates stay, and one number for each module is trained."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import Adapter, split_fused
from jcrosslora.architectures.blocks import ROLE_PATHS
from jcrosslora.checkpoint import BaseModel, open_base
from jcrosslora.checkpoint.tokenizer import Tokenizer
from jcrosslora.decoder import Model, StackedAdapter, StackedFactors, load_model, stack_adapter
from jcrosslora.errors import UsageError
from jcrosslora.evaluate.examples import Example, read_examples
from jcrosslora.linalg import product_energy
from jcrosslora.training.batches import Batch, answer_loss
from jcrosslora.training.checkpoints import TrainingSettings
from jcrosslora.training.run import train

Magnitudes = dict[str, jax.Array]


def first_magnitudes(adapter: StackedAdapter) -> Magnitudes:
    """Return the Frobenius norms ||dW|| of an adapter's updates: role -> float32 (L,), 0 where there is none."""
    # The sum of products of two Gram matrices, which rounding may take below zero.
    return {
        role: jnp.sqrt(jnp.maximum(jax.vmap(product_energy)(one.b, one.a), 0)) for role, one in adapter.roles.items()
    }


def with_magnitudes(adapter: StackedAdapter, magnitudes: Magnitudes) -> StackedAdapter:
    """Give the updates other magnitudes: each becomes m dW / ||dW||, after SD-LoRA (Wu et al., ICLR 2025).

    SD-LoRA divides by ||B|| ||A||, which depends on how the update is split into factors; here it is ||B A||.

    Args:
        adapter: A (L, K, I) and B (L, O, K) of each role.
        magnitudes: role -> m, float32 (L,); other roles keep theirs. An update of zero stays zero.
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

    The adapter gives the directions, the scale inside B; the magnitudes are float32 (L,) of each role. `remat`
    recomputes each layer in the backward pass.
    """

    def loss(magnitudes: Magnitudes) -> jax.Array:
        return answer_loss(model.with_adapter(with_magnitudes(adapter, magnitudes)), batch, remat)

    return jax.value_and_grad(loss)(magnitudes)


def fit_magnitudes(
    base: BaseModel | str | Path,
    examples: Sequence[Example] | str | Path,
    adapter: Adapter,
    settings: TrainingSettings = TrainingSettings(rate=0.05),  # noqa: B008
    *,
    model: Model | None = None,
    tokenizer: Tokenizer | None = None,
) -> Adapter:
    """Train the magnitude of every update of an adapter on examples; the directions stay as they are.

    It is the cheapest fit: a model of 30 layers has 210 numbers to train. They are trained in units of the
    adapter's own magnitudes, so that `settings.rate` is a share of them for each step, whatever their sizes.

    Args:
        base: the model, opened, or what `open_base` opens.
        examples: at least one, or the JSONL file of them (see `read_examples`).
        adapter: of this base, such as one that was moved to it.
        settings: of the training. Only updates of its `modules` are trained; its rank and alpha are not used.
        model: the base in `settings.dtype`, if it is loaded already.
        tokenizer: of the base, if it is loaded already.

    Returns:
        The adapter with other magnitudes inside B, in float32 there; its updates of fused modules are split.

    Raises:
        UsageError: settings out of range, the optimiser lora-rite, which is for factors, an adapter without updates
            of the modules, or as `train_lora`.
        AdapterError: the adapter does not fit the base.
        CheckpointError: the base or its tokenizer cannot be read.
    """
    settings.check()
    base = base if isinstance(base, BaseModel) else open_base(base)
    adapter = split_fused(adapter, base.fused)
    stacked = stack_adapter(adapter, base)
    modules = tuple(stacked.roles) if settings.modules is None else settings.modules
    units = {role: norms for role, norms in first_magnitudes(stacked).items() if role in modules}
    if not any(np.any(norms) for norms in units.values()):
        msg = f"{adapter.info.name} has no update of {', '.join(modules)}: wanted one whose magnitude to train"
        raise UsageError(msg)
    loaded = model or load_model(base, settings.dtype)

    def gradient_of(shares: Magnitudes, batch: Batch) -> tuple[jax.Array, Magnitudes]:
        magnitudes = jax.tree.map(jnp.multiply, shares, units)
        loss, gradient = loss_and_magnitude_gradient(loaded, stacked, magnitudes, batch, settings.remat)
        return loss, jax.tree.map(jnp.multiply, gradient, units)

    shares = train(
        base,
        read_examples(examples) if isinstance(examples, str | Path) else examples,
        settings,
        jax.tree.map(jnp.ones_like, units),
        gradient_of,
        tokenizer=tokenizer,
    )
    return _rescaled(adapter, base, {role: np.asarray(values) for role, values in shares.items()})


def _rescaled(adapter: Adapter, base: BaseModel, shares: dict[str, np.ndarray]) -> Adapter:
    """Multiply B of each module by its share, (L,) for each role of L layers."""
    modules = dict(adapter.modules)
    for role, values in shares.items():
        for layer, share in zip(base.layers_with(role), values, strict=True):
            name = f"model.layers.{layer}.{ROLE_PATHS[role]}"
            if name in modules:
                modules[name] = dataclasses.replace(modules[name], b=np.asarray(modules[name].b, np.float32) * share)
    return dataclasses.replace(adapter, modules=modules)
