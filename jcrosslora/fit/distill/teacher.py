"""The teacher: what the target should predict, from its own predictions and the source's without and with adapter.

All passes read bases that are reduced to the tokens that occur, and predict among the shared tokens.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.decoder import DecoderSettings, Params, StackedAdapter, forward, logits
from jcrosslora.decoder.forward import head_of
from jcrosslora.fit.distill.batches import DistillationBatch
from jcrosslora.fit.distill.settings import DistillSettings
from jcrosslora.fit.distill.symbols import Symbols, in_target_symbols
from jcrosslora.fit.distill.token_choice import chosen_weights


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
        embedding = params.embedding if kept is None else params.embedding[kept]
        bias = None if params.head_bias is None else params.head_bias[predicted]
        params = dataclasses.replace(params, embedding=embedding, head=head, head_bias=bias)
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
        self,
        source: ReducedBase,
        target: ReducedBase,
        adapter: StackedAdapter,
        settings: DistillSettings,
        symbols: Symbols,
    ) -> None:
        self._source, self.target, self._symbols = source, target, symbols
        self._weights = settings.teacher_weight, settings.contrast_weight
        self._token_share = settings.token_share
        # Zeros instead of no adapter: one compiled program serves both.
        self._adapters = jax.tree.map(jnp.zeros_like, adapter), adapter

    def read(self, batch: DistillationBatch) -> TaughtBatch:
        """Make the teacher's predictions on a batch."""
        teacher_weight, contrast_weight = self._weights
        # What has no weight is not worth a pass.
        chosen = self._token_share < 1
        taught, base, adapted = self.sides(batch, own=teacher_weight < 1, base=contrast_weight != 0 or chosen)
        if chosen:
            answer, following = jnp.asarray(batch.answer), jnp.asarray(self._symbols.following(batch))
            share = jnp.float32(self._token_share)
            weight = chosen_weights(taught.weight, answer, following, base, adapted, share)
            taught = dataclasses.replace(taught, weight=weight)
        mixed = mix_teacher(taught.teacher, base, adapted, jnp.float32(teacher_weight), jnp.float32(contrast_weight))
        return dataclasses.replace(taught, teacher=mixed)

    def sides(
        self, batch: DistillationBatch, *, own: bool = True, base: bool = True
    ) -> tuple[TaughtBatch, jax.Array, jax.Array]:
        """Make what the teacher is mixed of, each float32 (P, V) log-probabilities in the target's symbols.

        Args:
            batch: to read.
            own: whether the target reads it; if not, its predictions are those of the adapted source.
            base: whether the source reads it without its adapter; likewise.

        Returns:
            The batch with the target's own predictions in place of the teacher's; and the source's predictions without
            and with its adapter.
        """
        src, tgt = self._source, self.target
        read_src = src.rows(batch.tokens_src), jnp.asarray(batch.mask_src), jnp.asarray(batch.at_src)
        read_tgt = tgt.rows(batch.tokens_tgt), jnp.asarray(batch.mask_tgt), jnp.asarray(batch.at_tgt)
        moved, to, weight = map(jnp.asarray, self._symbols.columns(batch))
        sizes = {"shared": len(self._symbols.shared[1]), "own": len(self._symbols.own[1]), "end": src.ends > 0}

        def of_source(adapter: StackedAdapter) -> jax.Array:
            found = shared_log_probs(src.settings, src.params, adapter, *read_src, ends=src.ends)
            return in_target_symbols(found, moved, to, **sizes)

        adapted = of_source(self._adapters[1])
        plain = of_source(self._adapters[0]) if base else adapted
        found = shared_log_probs(tgt.settings, tgt.params, None, *read_tgt, ends=tgt.ends) if own else adapted
        return TaughtBatch(*read_tgt, weight, found), plain, adapted


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
