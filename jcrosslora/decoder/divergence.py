"""Compute the KL divergence of two runs of one model without the logits of all positions at once."""

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.decoder.chunks import map_positions
from jcrosslora.decoder.forward import logits
from jcrosslora.decoder.params import Params
from jcrosslora.decoder.settings import DecoderSettings


@flax.struct.dataclass
class Divergence:
    """Predictions of one model from hidden states a and b, per position, in nats.

    Attributes:
        kl: float32 (...), KL(a || b) over the whole vocabulary.
        log_probs_a: float32 (...), log p_a(target).
        log_probs_b: float32 (...), log p_b(target).
    """

    kl: jax.Array
    log_probs_a: jax.Array
    log_probs_b: jax.Array


def divergence(
    settings: DecoderSettings,
    params: Params,
    hidden_a: jax.Array,
    hidden_b: jax.Array,
    targets: jax.Array,
    *,
    chunk: int = 64,
) -> Divergence:
    """Compare the predictions from two hidden states at every position, through the same head.

    Memory is a few times `chunk` rows of V numbers, in the backward pass as well, which computes the logits again.

    Args:
        settings: of the model.
        params: its weights; an adapter changes the hidden states, never the head.
        hidden_a: (..., H), `forward(...).hidden`.
        hidden_b: (..., H), of another run over the same tokens, e.g. with an adapter.
        targets: int32 (...), a token for each position, e.g. the next one.
        chunk: positions at a time, static.
    """

    def compare(part: tuple[jax.Array, jax.Array, jax.Array]) -> Divergence:
        states_a, states_b, wanted = part
        log_a, log_b = (jax.nn.log_softmax(logits(settings, params, states), -1) for states in (states_a, states_b))
        chosen = (jnp.take_along_axis(log, wanted[:, None], axis=-1)[:, 0] for log in (log_a, log_b))
        return Divergence(_kl(log_a, log_b), *chosen)

    return map_positions(compare, (hidden_a, hidden_b, targets), targets.shape, chunk)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    # The sums of p_a and of p_b are both 1. Adding their difference makes every term non-negative. A rounding error c
    # of a normaliser, which is larger than the KL of two nearly equal states, then enters as c^2 instead of c.
    p_a, p_b = jnp.exp(log_a), jnp.exp(log_b)
    return jnp.sum(p_a * (log_a - log_b) - p_a + p_b, axis=-1)
