"""Log-probabilities of tokens and divergences of predictions, without the logits of all positions at once."""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder.forward import finish_logits, logits
from jcrosslora.decoder.model import Model


def target_log_probs(model: Model, hidden: jax.Array, targets: jax.Array, *, chunk: int = 128) -> jax.Array:
    """Return float32 (B, T), log p(target) at every position, in nats.

    Memory is `chunk` rows of V logits, in the backward pass as well, which computes them again. Under `jax.vmap` over N
    adapters it is N times that.

    Args:
        model: whose head is used.
        hidden: (B, T, H), `forward(...).hidden`.
        targets: int32 (B, T), the token after each position.
        chunk: positions at a time, static.
    """
    params = model.params
    head = params.output_head

    def log_probs(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, wanted = part
        # Computed apart, because the gradient of a gather from all logits is a scatter into V columns, which takes
        # twice the time.
        chosen = jnp.sum(states.astype(jnp.float32) * head[wanted].astype(jnp.float32), axis=-1)
        chosen = finish_logits(model.settings, chosen, None if params.head_bias is None else params.head_bias[wanted])
        scores = logits(model, states)
        return chosen - jax.nn.logsumexp(scores, axis=-1)

    return map_positions(log_probs, (hidden, targets), targets.shape, chunk)


def map_positions(
    function: Callable[..., Any], arrays: tuple[jax.Array, ...], shape: tuple[int, ...], chunk: int
) -> Any:
    """Apply a function to chunks of positions; the backward pass computes each chunk again.

    Args:
        function: of one tuple: (chunk, ...) of each array. It returns a tree of arrays (chunk,).
        arrays: each `shape` followed by its own features.
        shape: of the positions, e.g. (B, T).
        chunk: positions at a time, static.

    Returns:
        The tree of `function`, with leaves of `shape`.
    """
    count = math.prod(shape)
    size = min(chunk, count)
    padding = -count % size

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(count, *x.shape[len(shape) :])
        return jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

    # A loop body has no common subexpressions to keep apart.
    found = lax.map(jax.checkpoint(function, prevent_cse=False), tuple(map(cut, arrays)))
    return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(shape), found)


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
    model: Model, hidden_a: jax.Array, hidden_b: jax.Array, targets: jax.Array, *, chunk: int = 64
) -> Divergence:
    """Compare the predictions from two hidden states at every position, through the same head.

    Memory is a few times `chunk` rows of V numbers, in the backward pass as well, which computes the logits again.

    Args:
        model: whose head is used; an adapter changes the hidden states, never the head.
        hidden_a: (..., H), `forward(...).hidden`.
        hidden_b: (..., H), of another run over the same tokens, e.g. with an adapter.
        targets: int32 (...), a token for each position, e.g. the next one.
        chunk: positions at a time, static.
    """

    def compare(part: tuple[jax.Array, jax.Array, jax.Array]) -> Divergence:
        states_a, states_b, wanted = part
        log_a, log_b = (jax.nn.log_softmax(logits(model, states), -1) for states in (states_a, states_b))
        chosen = (jnp.take_along_axis(log, wanted[:, None], axis=-1)[:, 0] for log in (log_a, log_b))
        return Divergence(_kl(log_a, log_b), *chosen)

    return map_positions(compare, (hidden_a, hidden_b, targets), targets.shape, chunk)


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    # The sums of p_a and of p_b are both 1. Adding their difference makes every term non-negative. A rounding error c
    # of a normaliser, which is larger than the KL of two nearly equal states, then enters as c^2 instead of c.
    p_a, p_b = jnp.exp(log_a), jnp.exp(log_b)
    return jnp.sum(p_a * (log_a - log_b) - p_a + p_b, axis=-1)
