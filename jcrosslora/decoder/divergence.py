"""How far two states of one model are apart in what they predict, without the logits of all positions at once."""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder.forward import logits
from jcrosslora.decoder.params import Params
from jcrosslora.decoder.settings import DecoderSettings

CHUNK = 64


@flax.struct.dataclass
class Divergence:
    """Predictions of the same model from hidden states a and b, position by position, in nats.

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
    chunk: int = CHUNK,
) -> Divergence:
    """Compare two hidden states at every position; both go through the same head.

    The positions are taken `chunk` at a time, so that the memory is a few times `chunk` rows of V numbers, in the
    backward pass as well, where the logits are computed again.

    Args:
        settings: of the model.
        params: its weights; an adapter changes the hidden states, never the head.
        hidden_a: (..., H), `forward(...).hidden`.
        hidden_b: (..., H), of another run over the same tokens, e.g. with an adapter.
        targets: int32 (...), a token at each position, e.g. the one that follows.
        chunk: positions at a time, static.
    """
    count = targets.size
    size = min(chunk, count)
    padding = -count % size

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[targets.ndim :])
        return jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    @partial(jax.checkpoint, prevent_cse=False)  # a loop body has no common subexpressions to keep apart
    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> Divergence:
        states_a, states_b, wanted = part
        log_a, log_b = (jax.nn.log_softmax(logits(settings, params, states), -1) for states in (states_a, states_b))
        chosen = (jnp.take_along_axis(log, wanted[:, None], axis=-1)[:, 0] for log in (log_a, log_b))
        return Divergence(_kl(log_a, log_b), *chosen)

    found = lax.map(one, (cut(hidden_a), cut(hidden_b), cut(targets)))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(targets.shape), found)


def mean_kl(
    settings: DecoderSettings,
    params: Params,
    hidden_a: jax.Array,
    hidden_b: jax.Array,
    *,
    valid: jax.Array | None = None,
    chunk: int = CHUNK,
) -> jax.Array:
    """Scalar: the mean of KL(a || b) over positions, in nats; differentiable in both hidden states.

    Args:
        settings: of the model.
        params: its weights.
        hidden_a: (..., H).
        hidden_b: (..., H).
        valid: bool (...), the positions that count; None for all. Without any the mean is 0.
        chunk: positions at a time, static; see `divergence`.
    """
    unused = jnp.zeros(hidden_a.shape[:-1], jnp.int32)
    kl = divergence(settings, params, hidden_a, hidden_b, unused, chunk=chunk).kl
    if valid is None:
        return jnp.mean(kl)
    return jnp.sum(jnp.where(valid, kl, 0)) / jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    # The sums of p_a and of p_b are both 1. With their difference added no term is negative, and a rounding error c
    # of a normaliser, which is larger than the KL of two nearly equal states, enters as c^2 instead of c.
    p_a, p_b = jnp.exp(log_a), jnp.exp(log_b)
    return jnp.sum(p_a * (log_a - log_b) - p_a + p_b, axis=-1)
