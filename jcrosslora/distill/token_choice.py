"""The choice of tokens to fit: those of an answer whose probability the adapter raises most.

TiTok (Jung and Kim 2025, arXiv 2510.04682) trains on the tokens of an answer with the highest excess
S(y) = log p_adapted(y) - log p_base(y), and leaves out the rest, which the base knows as well.
"""

import jax
import jax.numpy as jnp


@jax.jit
def chosen_weights(
    weight: jax.Array, answer: jax.Array, following: jax.Array, base: jax.Array, adapted: jax.Array, share: jax.Array
) -> jax.Array:
    """Set the weights of an answer's tokens to 0, but for the share with the highest excess.

    Positions of prompts, and those that no known token follows, such as the end of an answer, keep their weights.

    Args:
        weight: float32 (P,), of each position.
        answer: bool (P,), whether a token of the answer follows.
        following: int32 (P,), column of the token that follows, -1 where there is none.
        base: float32 (P, V), log-probabilities of the source.
        adapted: float32 (P, V), of the source with its adapter.
        share: float32 scalar, 0 to 1, of the answer's tokens in the batch that are kept.
    """
    judged = answer & (weight > 0) & (following >= 0)
    columns = jnp.maximum(following, 0)[:, None]
    excess = jnp.take_along_axis(adapted - base, columns, axis=1)[:, 0]
    threshold = jnp.nanquantile(jnp.where(judged, excess, jnp.nan), 1 - share)
    return jnp.where(judged & (excess < threshold), 0, weight)
