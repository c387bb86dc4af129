"""Choose the experts of each token, in float32, as the router of each class in transformers does."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.architectures.ops import linear

# Of the experts: a softmax over all, over the chosen ones, or sigmoids, by which experts are chosen or of the chosen
# ones; or "in turn", where a softmax over those that score nearly as high as the best weighs the best, and one without
# the best the second.
Scores = Literal["softmax", "chosen", "sigmoid", "chosen sigmoid", "in turn"]


@dataclass(frozen=True)
class Routing:
    """How experts are chosen for a token, and weighed.

    Attributes:
        count: E, number of experts.
        used: number of experts that a token goes through.
        scores: of the experts.
        normalised: whether the weights of a token's experts sum to 1.
        sum_eps: added to their sum before they are divided by it; sigmoids may be zero.
        tolerance: of "in turn", half the largest relative distance from the best score; None for other scores.
        scale: factor on the weights.
        scaled_inputs: whether the weights are factors on what the experts read, instead of on what they return.
        groups: number of groups of experts.
        used_groups: number of groups that a token may use.
        group_best: how many of a group's experts say how high it scores, the best of them together.
    """

    count: int
    used: int
    scores: Scores
    normalised: bool
    sum_eps: float
    tolerance: float | None
    scale: float
    scaled_inputs: bool
    groups: int
    used_groups: int
    group_best: int


def route(
    settings: Routing, x: jax.Array, router: jax.Array, bias: jax.Array | None, correction: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of tokens.

    Args:
        settings: how they are chosen.
        x: (T, H), the normed stream.
        router: float32 (E, H).
        bias: float32 (E,), or None.
        correction: float32 (E,), added to the scores for the choice alone; or None.

    Returns:
        int32 (T, K), the experts of each token, and float32 (T, K), their weights.
    """
    logits = linear(x.astype(jnp.float32), router)
    logits = logits if bias is None else logits + bias
    if settings.scores == "chosen":
        best, experts = lax.top_k(logits, settings.used)
        return experts, jax.nn.softmax(best, axis=-1)
    if settings.scores == "chosen sigmoid":
        best, experts = lax.top_k(logits, settings.used)
        return experts, _weights(settings, jax.nn.sigmoid(best))
    if settings.tolerance is not None:
        return _in_turn(logits, settings.tolerance)
    scores = jax.nn.sigmoid(logits) if settings.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores if correction is None else scores + correction
    experts = lax.top_k(_in_groups(settings, lax.stop_gradient(choice)), settings.used)[1]
    return experts, _weights(settings, jnp.take_along_axis(scores, experts, axis=-1))


def _weights(settings: Routing, scores: jax.Array) -> jax.Array:
    """Return the weights of experts by their scores (T, K)."""
    if settings.normalised:
        scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + settings.sum_eps)
    return scores * settings.scale


def _in_turn(logits: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """Choose the best expert and then the second, each with its share among those that score nearly as high.

    Follows `sparsemixer` of transformers (arXiv 2409.12136) as it is outside of training.
    """
    experts, weights, left = [], [], logits
    for _ in range(2):
        best = jnp.max(left, axis=-1, keepdims=True)
        distance = (best - logits) / jnp.maximum(jnp.abs(logits), best)
        near = jax.nn.softmax(jnp.where(lax.stop_gradient(distance) > 2 * tolerance, -jnp.inf, left), axis=-1)
        expert = jnp.argmax(left, axis=-1, keepdims=True).astype(jnp.int32)
        weights.append(jnp.take_along_axis(near, expert, axis=-1))
        experts.append(expert)
        left = jnp.where(jnp.arange(logits.shape[-1]) == expert, -jnp.inf, left)
    return jnp.concatenate(experts, axis=-1), jnp.concatenate(weights, axis=-1)


def _in_groups(settings: Routing, choice: jax.Array) -> jax.Array:
    """Return the scores (T, E), -inf outside the groups whose best experts score highest together."""
    if settings.groups == 1:
        return choice
    grouped = choice.reshape(len(choice), settings.groups, -1)
    best = jnp.sum(lax.top_k(grouped, min(settings.group_best, grouped.shape[-1]))[0], axis=-1)
    kept = lax.top_k(best, settings.used_groups)[1]
    inside = jnp.any(kept[:, :, None] == jnp.arange(settings.groups), axis=1)
    return jnp.where(inside[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
