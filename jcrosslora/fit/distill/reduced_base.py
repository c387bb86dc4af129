"""A base cut down to the tokens that occur: what it predicts among the shared ones, at matched positions."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, forward, logits
from jcrosslora.decoder.forward import head_of


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """A base that reads K kept tokens and predicts V shared ones.

    Attributes:
        settings: of the base.
        params: its weights, with an embedding of K rows and a head of V.
        kept: int32 (K,), ascending ids of the embedding's rows.
    """

    settings: DecoderSettings
    params: Params
    kept: np.ndarray

    def rows(self, tokens: np.ndarray) -> jax.Array:
        """int32: the rows of tokens, all of which are kept."""
        return jnp.asarray(np.searchsorted(self.kept, tokens).astype(np.int32))


def reader(settings: DecoderSettings, params: Params, tokens: np.ndarray, shared: np.ndarray) -> Reader:
    """Cut a base down to the embeddings of some tokens and the head's rows of the shared ones."""
    kept = np.unique(tokens)
    head = head_of(params)[shared]
    return Reader(settings, dataclasses.replace(params, embedding=params.embedding[kept], head=head), kept)


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


@jax.jit
def teach(
    target: jax.Array, base: jax.Array, adapted: jax.Array, teacher_weight: jax.Array, contrast_weight: jax.Array
) -> jax.Array:
    """float32 (P, V): what the target should predict.

    log t = (1 - teacher_weight) log p_tgt + teacher_weight log p_adapted + contrast_weight (log p_adapted - log p_base), normalised. With
    teacher_weight 0 the source's change in log-probability is added to the target's own; with teacher_weight 1 and contrast_weight 0 the teacher
    is the adapted source. The change alone is not enough: it leads away from the source without its adapter, which may
    predict something else than the target does.

    Args:
        target: (P, V), log-probabilities of the target.
        base: (P, V), of the source.
        adapted: (P, V), of the source with its adapter.
        teacher_weight: (), share of the adapted source.
        contrast_weight: (), of the source's change.
    """
    return jax.nn.log_softmax(
        target + teacher_weight * (adapted - target) + contrast_weight * (adapted - base), axis=-1
    )


@jax.jit
def weighted_kl(teacher: jax.Array, student: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum over positions of weight * KL(teacher || student), and the sum of the weights."""
    kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return jnp.sum(jnp.where(weight > 0, weight * kl, 0)), jnp.sum(weight)
