"""A base that predicts chosen columns alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import AppliedAdapter, DecoderSettings, Params, forward, logits
from jcrosslora.decoder.forward import head_of

NO_TOKEN = -1
_NEVER = -1e4  # added to the logit of a column without a token: its probability is 0 in float32


@dataclasses.dataclass(frozen=True, eq=False)
class ReducedBase:
    """A base that predicts its columns of the symbols of a fit.

    Attributes:
        settings: of the base.
        params: its weights, with a head that has a row for each predicted token.
        ends: number of tokens that end a text, the last rows of the head; together they are one symbol.
    """

    settings: DecoderSettings
    params: Params
    ends: int = 0

    @classmethod
    def of(
        cls,
        settings: DecoderSettings,
        params: Params,
        predicted: np.ndarray,
        ends: int = 0,
    ) -> "ReducedBase":
        """Keep the head's rows of the tokens `predicted`; a column of `NO_TOKEN` has no probability."""
        rows, none = np.maximum(predicted, 0), predicted == NO_TOKEN
        bias = None if params.head_bias is None else params.head_bias[rows]
        if none.any():
            bias = jnp.where(none, jnp.float32(_NEVER), 0.0 if bias is None else bias.astype(jnp.float32))
        return cls(settings, dataclasses.replace(params, head=head_of(params)[rows], head_bias=bias), ends)


def shared_scores(settings: DecoderSettings, params: Params, states: jax.Array, ends: int) -> jax.Array:
    """float32 (P, V): logits of the next symbol from hidden states (P, H); the last `ends` tokens are one symbol."""
    scores = logits(settings, params, states)
    if ends < 2:
        return scores
    end = jax.nn.logsumexp(scores[:, -ends:], axis=-1, keepdims=True)
    return jnp.concatenate([scores[:, :-ends], end], axis=-1)


@partial(jax.jit, static_argnames=("settings", "ends", "remat"))
def shared_log_probs(
    settings: DecoderSettings,
    params: Params,
    adapter: AppliedAdapter | None,
    tokens: jax.Array,
    mask: jax.Array,
    at: jax.Array,
    *,
    ends: int = 0,
    remat: bool = False,
) -> jax.Array:
    """float32 (P, V): log-probabilities of the next symbol among those of the head, at flat positions (P,)."""
    hidden = forward(settings, params, tokens, mask=mask, adapter=adapter, remat=remat).hidden
    states = hidden.reshape(-1, hidden.shape[-1])[at]
    return jax.nn.log_softmax(shared_scores(settings, params, states, ends), axis=-1)
