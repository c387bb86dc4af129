"""A model that predicts chosen columns alone."""

from __future__ import annotations

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import AppliedAdapter, Model, forward, logits

NO_TOKEN = -1
_NEVER = -1e4  # added to the logit of a column without a token: its probability is 0 in float32


@flax.struct.dataclass
class RestrictedModel:
    """A model that predicts its columns of the symbols of a fit.

    Attributes:
        model: whose head has a row for each predicted token.
        ends: number of tokens that end a text, the last rows of the head; together they are one symbol.
    """

    model: Model
    ends: int = flax.struct.field(pytree_node=False, default=0)

    @classmethod
    def of(cls, model: Model, predicted: np.ndarray, ends: int = 0) -> RestrictedModel:
        """Keep the head's rows of the tokens `predicted`; a column of `NO_TOKEN` has no probability."""
        params, rows, none = model.params, np.maximum(predicted, 0), predicted == NO_TOKEN
        bias = None if params.head_bias is None else params.head_bias[rows]
        if none.any():
            bias = jnp.where(none, jnp.float32(_NEVER), 0.0 if bias is None else bias.astype(jnp.float32))
        params = dataclasses.replace(params, head=params.output_head[rows], head_bias=bias)
        return cls(dataclasses.replace(model, params=params), ends)

    def with_adapter(self, adapter: AppliedAdapter | None) -> RestrictedModel:
        """Return the same base with another adapter, or alone."""
        return RestrictedModel(self.model.with_adapter(adapter), self.ends)


def shared_scores(restricted: RestrictedModel, states: jax.Array) -> jax.Array:
    """float32 (P, V): logits of the next symbol from hidden states (P, H); the end of a text is one."""
    scores, ends = logits(restricted.model, states), restricted.ends
    if ends < 2:
        return scores
    end = jax.nn.logsumexp(scores[:, -ends:], axis=-1, keepdims=True)
    return jnp.concatenate([scores[:, :-ends], end], axis=-1)


@partial(jax.jit, static_argnames="remat")
def shared_log_probs(
    restricted: RestrictedModel, tokens: jax.Array, mask: jax.Array, at: jax.Array, *, remat: bool = False
) -> jax.Array:
    """float32 (P, V): log-probabilities of the next symbol among those of the head, at flat positions (P,)."""
    hidden = forward(restricted.model, tokens, mask=mask, remat=remat).hidden
    states = hidden.reshape(-1, hidden.shape[-1])[at]
    return jax.nn.log_softmax(shared_scores(restricted, states), axis=-1)
