"""A base reduced to the tokens that occur, which predicts among the shared tokens at matched positions."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, forward, logits
from jcrosslora.decoder.forward import head_of


@dataclasses.dataclass(frozen=True, eq=False)
class ReducedBase:
    """A base that reads K kept tokens and predicts V shared ones.

    Attributes:
        settings: of the base.
        params: its weights, with an embedding of K rows and a head of V.
        kept: int32 (K,), ascending ids of the embedding's rows.
    """

    settings: DecoderSettings
    params: Params
    kept: np.ndarray

    @classmethod
    def of(cls, settings: DecoderSettings, params: Params, kept: np.ndarray, shared: np.ndarray) -> "ReducedBase":
        """Keep the embeddings of the tokens `kept`, and the head's rows of the tokens `shared`."""
        head = head_of(params)[shared]
        return cls(settings, dataclasses.replace(params, embedding=params.embedding[kept], head=head), kept)

    def rows(self, tokens: np.ndarray) -> jax.Array:
        """Return the embedding's rows of tokens, int32; all tokens must be kept ones."""
        return jnp.asarray(np.searchsorted(self.kept, tokens).astype(np.int32))


@partial(jax.jit, static_argnums=0)
def shared_log_probs(
    settings: DecoderSettings,
    params: Params,
    adapter: StackedAdapter | None,
    tokens: jax.Array,
    mask: jax.Array,
    at: jax.Array,
) -> jax.Array:
    """float32 (P, V): log-probabilities of the next token among those of the head, at flat positions (P,)."""
    hidden = forward(settings, params, tokens, mask=mask, adapter=adapter).hidden
    states = hidden.reshape(-1, hidden.shape[-1])[at]
    return jax.nn.log_softmax(logits(settings, params, states), axis=-1)
