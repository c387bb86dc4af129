"""Choose the experts of each token, in float32, as the router of each class in transformers does."""

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder.experts.settings import ExpertSettings
from jcrosslora.decoder.ops import linear


def route(
    settings: ExpertSettings, x: jax.Array, router: jax.Array, bias: jax.Array | None, correction: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of tokens.

    Args:
        settings: of the experts.
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
    scores = jax.nn.sigmoid(logits) if settings.scores == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = scores if correction is None else scores + correction
    experts = lax.top_k(_in_groups(settings, lax.stop_gradient(choice)), settings.used)[1]
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if settings.normalised:
        # A sum of sigmoids may be zero.
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + (1e-20 if settings.scores == "sigmoid" else 0))
    return experts, weights * settings.scale


def _in_groups(settings: ExpertSettings, choice: jax.Array) -> jax.Array:
    """Return the scores (T, E), -inf outside the groups whose best two experts score highest together."""
    if settings.groups == 1:
        return choice
    grouped = choice.reshape(len(choice), settings.groups, -1)
    best = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    kept = lax.top_k(best, settings.used_groups)[1]
    inside = jnp.any(kept[:, :, None] == jnp.arange(settings.groups), axis=1)
    return jnp.where(inside[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
