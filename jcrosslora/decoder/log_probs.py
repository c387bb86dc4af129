"""Compute log-probabilities of given tokens without the logits of all positions at once."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.chunks import map_positions
from jcrosslora.decoder.forward import head_of, logits
from jcrosslora.decoder.ops import soft_cap
from jcrosslora.decoder.params import Params
from jcrosslora.decoder.settings import DecoderSettings


def target_log_probs(
    settings: DecoderSettings, params: Params, hidden: jax.Array, targets: jax.Array, *, chunk: int = 128
) -> jax.Array:
    """Return float32 (B, T), log p(target) at every position, in nats.

    Memory is `chunk` rows of V logits, in the backward pass as well, which computes them again. Under `jax.vmap` over N
    adapters it is N times that.

    Args:
        settings: of the model.
        params: its weights.
        hidden: (B, T, H), `forward(...).hidden`.
        targets: int32 (B, T), the token after each position.
        chunk: positions at a time, static.
    """
    head = head_of(params)

    def log_probs(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, wanted = part
        # Computed apart, because the gradient of a gather from all logits is a scatter into V columns, which takes
        # twice the time.
        chosen = jnp.sum(states.astype(jnp.float32) * head[wanted].astype(jnp.float32), axis=-1)
        scores = logits(settings, params, states)
        return soft_cap(chosen, settings.final_soft_cap) - jax.nn.logsumexp(scores, axis=-1)

    return map_positions(log_probs, (hidden, targets), targets.shape, chunk)
