"""Train the encoder of adapters by their weights, contrastively with the vectors of their samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jcrosslora.errors import UsageError
from jcrosslora.shelf.retrieval.weight_encoder import Tree, Weights, encode_texts, encode_weights
from jcrosslora.utils.progress import track

_SHARPNESS = 10.0  # of the cosines, as published
_HELD_BYTES = 1 << 30  # of weights that are kept in memory between steps


@dataclass(frozen=True)
class ProbeSettings:
    """The settings of the training.

    Attributes:
        steps: updates.
        batch: adapters of a step, with one sample each.
        rate: the highest learning rate, of AdamW; it falls by half a cosine.
        weight_decay: of AdamW.
        seed: of all that is drawn.
    """

    steps: int = 300
    batch: int = 8
    rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a setting is out of range.
        """
        if self.steps < 1 or self.batch < 2 or not 0 < self.rate < float("inf"):
            came = f"steps {self.steps}, batch {self.batch}, rate {self.rate}"
            msg = f"{came}: wanted 1 step or more, 2 adapters or more in a batch, and a rate above 0"
            raise UsageError(msg)


def contrastive_loss(parameters: Mapping[str, jax.Array], weights: Weights, texts: jax.Array) -> jax.Array:
    """Return the symmetric cross-entropy of 10 times the cosines of B adapters and B prompts, pair by pair.

    Args:
        parameters: of the encoder.
        weights: stacked, with a first axis of B.
        texts: (B, D), vectors of a prompt of each adapter.
    """
    adapters = jax.vmap(encode_weights, in_axes=(None, 0))(parameters, weights)
    scores = _SHARPNESS * encode_texts(parameters, texts) @ adapters.T
    places = jnp.arange(len(scores))
    both = (jax.nn.log_softmax(each, axis=-1)[places, places].mean() for each in (scores, scores.T))
    return -sum(both, start=jnp.float32(0)) / 2


def train_encoder(
    parameters: Tree, samples: Sequence[np.ndarray], load: Callable[[int], Weights], settings: ProbeSettings
) -> tuple[Tree, list[float]]:
    """Train on the samples of N adapters.

    Adapters are loaded for each step, and at most 1 GB of their weights is kept.

    Args:
        parameters: to start from.
        samples: of each adapter vectors (m, D), at least one.
        load: loads the weights of an adapter by its place.
        settings: of the training.

    Returns:
        The parameters, and the loss of each step.

    Raises:
        UsageError: a setting is out of range, or a loss that is not finite.
    """
    settings.check()
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(settings.rate, settings.steps), weight_decay=settings.weight_decay
    )
    size = sum(array.nbytes for pair in load(0).values() for array in pair)
    held = lru_cache(maxsize=max(settings.batch, _HELD_BYTES // size))(load)

    @lru_cache(maxsize=1)  # on a small shelf every step has all adapters
    def stacked(places: tuple[int, ...]) -> Weights:
        return jax.tree.map(lambda *each: jnp.asarray(np.stack(each)), *map(held, places))

    rng, state, losses = np.random.default_rng(settings.seed), optimizer.init(parameters), []

    @jax.jit
    def step(parameters: Tree, state: Any, weights: Weights, texts: jax.Array) -> tuple[Tree, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(contrastive_loss)(parameters, weights, texts)
        with jax.numpy_dtype_promotion("standard"):  # optax relies on it
            updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss  # pyright: ignore[reportReturnType]

    with track(settings.steps, "train weight probes", "steps") as bar:
        for _ in range(settings.steps):
            chosen = sorted(rng.permutation(len(samples))[: settings.batch].tolist())
            texts = np.stack([samples[place][rng.integers(len(samples[place]))] for place in chosen])
            parameters, state, loss = step(parameters, state, stacked(tuple(chosen)), jnp.asarray(texts))
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                msg = f"the loss of the weight probes is {losses[-1]} at step {len(losses)}: lower the rate, which is "
                raise UsageError(msg + f"{settings.rate:g}")
            bar.update()
    return parameters, losses
