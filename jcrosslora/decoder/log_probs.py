"""Log-probabilities of given tokens without the logits of all positions at once."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder.forward import head_of, logits
from jcrosslora.decoder.ops import soft_cap
from jcrosslora.decoder.params import Params
from jcrosslora.decoder.settings import DecoderSettings


def target_log_probs(
    settings: DecoderSettings, params: Params, hidden: jax.Array, targets: jax.Array, *, chunk: int = 128
) -> jax.Array:
    """float32 (B, T): log p(target) at every position, in nats.

    The positions are taken `chunk` at a time, so that the memory is `chunk` rows of V logits, in the backward pass
    as well, where they are computed again. Under `jax.vmap` over N adapters it is N times that.

    Args:
        settings: of the model.
        params: its weights.
        hidden: (B, T, H), `forward(...).hidden`.
        targets: int32 (B, T), the token that follows each position.
        chunk: positions at a time, static.
    """
    count = targets.size
    size = min(chunk, count)
    padding = -count % size
    rows = jnp.pad(hidden.reshape(count, -1), ((0, padding), (0, 0))).reshape(-1, size, hidden.shape[-1])
    wanted = jnp.pad(targets.reshape(count), (0, padding)).reshape(-1, size)

    head = head_of(params)

    @partial(jax.checkpoint, prevent_cse=False)  # a loop body has no common subexpressions to keep apart
    def one(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, wanted = part
        # Not picked from all the logits: the gradient of that is a scatter into V columns, which takes twice the time.
        chosen = jnp.sum(states.astype(jnp.float32) * head[wanted].astype(jnp.float32), axis=-1)
        scores = logits(settings, params, states)
        return soft_cap(chosen, settings.final_cap) - jax.nn.logsumexp(scores, axis=-1)

    return lax.map(one, (rows, wanted)).reshape(-1)[:count].reshape(targets.shape)
