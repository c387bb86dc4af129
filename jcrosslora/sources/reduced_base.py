"""A base that reads the tokens that occur, and predicts chosen columns alone."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import AppliedAdapter, DecoderSettings, Params, forward, logits
from jcrosslora.decoder.forward import head_of


@dataclasses.dataclass(frozen=True, eq=False)
class ReducedBase:
    """A base that reads K kept tokens and predicts its columns of the symbols of a fit.

    Attributes:
        settings: of the base.
        params: its weights, with an embedding of K rows, and a head with a row for each predicted token.
        kept: int32 (K,), ascending ids of the embedding's rows; None keeps all.
        ends: number of tokens that end a text, the last rows of the head; together they are one symbol.
    """

    settings: DecoderSettings
    params: Params
    kept: np.ndarray | None
    ends: int = 0

    @classmethod
    def of(
        cls,
        settings: DecoderSettings,
        params: Params,
        kept: np.ndarray | None,
        predicted: np.ndarray,
        ends: int = 0,
    ) -> "ReducedBase":
        """Keep the embeddings of the tokens `kept`, or all, and the head's rows of the tokens `predicted`."""
        head = head_of(params)[predicted]
        params = params if kept is None else params.with_tokens(kept)
        bias = None if params.head_bias is None else params.head_bias[predicted]
        params = dataclasses.replace(params, head=head, head_bias=bias)
        return cls(settings, params, kept, ends)

    def rows(self, tokens: np.ndarray) -> jax.Array:
        """Return the embedding's rows of tokens, int32; all tokens must be kept ones."""
        return jnp.asarray(tokens if self.kept is None else np.searchsorted(self.kept, tokens).astype(np.int32))


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
