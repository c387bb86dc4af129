"""The teacher: what the target should predict, from its own predictions and the source's without and with adapter.

All passes read bases that are reduced to the tokens that occur, and predict among the shared tokens.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, forward, logits
from jcrosslora.decoder.forward import head_of
from jcrosslora.fit.distill.batches import DistillationBatch
from jcrosslora.fit.distill.settings import DistillSettings


@dataclasses.dataclass(frozen=True, eq=False)
class ReducedBase:
    """A base that reads K kept tokens and predicts V symbols: the shared tokens, and the end of the text.

    Attributes:
        settings: of the base.
        params: its weights, with an embedding of K rows, and a head with a row for each shared token and for each token
            that ends a text.
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
        shared: np.ndarray,
        ends: Sequence[int] = (),
    ) -> "ReducedBase":
        """Keep the embeddings of the tokens `kept`, or all, and the head's rows of the tokens `shared` and `ends`."""
        head = head_of(params)[np.concatenate([shared, np.array(ends, shared.dtype)])]
        embedding = params.embedding if kept is None else params.embedding[kept]
        params = dataclasses.replace(params, embedding=embedding, head=head)
        return cls(settings, params, kept, len(ends))

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
    adapter: StackedAdapter | None,
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


@flax.struct.dataclass
class TaughtBatch:
    """A batch as the target reads it, with the teacher's predictions.

    Attributes:
        tokens: int32 (B, T), rows of the embedding.
        mask: bool (B, T).
        at: int32 (P,), flat positions.
        weight: float32 (P,).
        teacher: float32 (P, V), log-probabilities.
    """

    tokens: jax.Array
    mask: jax.Array
    at: jax.Array
    weight: jax.Array
    teacher: jax.Array


class Teacher:
    """The two bases and the source's adapter, from which the teacher's predictions are made."""

    def __init__(
        self, source: ReducedBase, target: ReducedBase, adapter: StackedAdapter, settings: DistillSettings
    ) -> None:
        self._source, self.target = source, target
        self._weights = jnp.float32(settings.teacher_weight), jnp.float32(settings.contrast_weight)
        # Zeros instead of no adapter: one compiled program serves both.
        self._adapters = jax.tree.map(jnp.zeros_like, adapter), adapter

    def read(self, batch: DistillationBatch) -> TaughtBatch:
        """Make the teacher's predictions on a batch."""
        src, tgt = self._source, self.target
        read_src = src.rows(batch.tokens_src), jnp.asarray(batch.mask_src), jnp.asarray(batch.at_src)
        read_tgt = tgt.rows(batch.tokens_tgt), jnp.asarray(batch.mask_tgt), jnp.asarray(batch.at_tgt)
        base, adapted = (
            shared_log_probs(src.settings, src.params, one, *read_src, ends=src.ends) for one in self._adapters
        )
        own = shared_log_probs(tgt.settings, tgt.params, None, *read_tgt, ends=tgt.ends)
        return TaughtBatch(*read_tgt, jnp.asarray(batch.weight), mix_teacher(own, base, adapted, *self._weights))


@jax.jit
def mix_teacher(
    target: jax.Array, base: jax.Array, adapted: jax.Array, teacher_weight: jax.Array, contrast_weight: jax.Array
) -> jax.Array:
    """float32 (P, V): the teacher's log-probabilities.

    log t = (1 - teacher_weight) log p_tgt + teacher_weight log p_adapted
            + contrast_weight (log p_adapted - log p_base), normalised.

    With teacher_weight 0 the source's change in log-probability is added to the target's own; with teacher_weight 1 and
    contrast_weight 0 the teacher is the adapted source. The change alone is not enough: it leads away from the source
    without its adapter, which may predict something else than the target does.

    Args:
        target: (P, V), log-probabilities of the target.
        base: (P, V), of the source.
        adapted: (P, V), of the source with its adapter.
        teacher_weight: (), share of the adapted source.
        contrast_weight: (), weight of the source's change.
    """
    mixed = target + teacher_weight * (adapted - target) + contrast_weight * (adapted - base)
    return jax.nn.log_softmax(mixed, axis=-1)


@jax.jit
def weighted_kl(teacher: jax.Array, student: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum weight * KL(teacher || student) over positions; also return the sum of the weights."""
    kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return jnp.sum(jnp.where(weight > 0, weight * kl, 0)), jnp.sum(weight)
