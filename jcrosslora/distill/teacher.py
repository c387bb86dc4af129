"""The teacher: mix the target's predictions with those of the source without and with its adapter.

The target, and a source that our decoder runs, compute logits for the output columns of the fit only.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.distill.batches import DistillationBatch
from jcrosslora.distill.output_columns import NEVER, OutputColumns, in_source_columns, in_target_columns
from jcrosslora.distill.sources import Reader
from jcrosslora.distill.sources.decoder import RestrictedModel, shared_log_probs


@flax.struct.dataclass
class TaughtBatch:
    """A batch as the target reads it, with the teacher's predictions.

    The shapes are (B, T), bool (B, T), flat positions (P,), float32 (P,), and float32 (P, V) log-probabilities.
    """

    tokens: jax.Array
    mask: jax.Array
    at: jax.Array
    weight: jax.Array
    teacher: jax.Array


class Teacher:
    """Makes the teacher's predictions from the source's reader and the target.

    Args:
        source: reads with and without the adapter.
        weights: see `mix_teacher` and `DistillSettings.teacher_weights`.
    """

    def __init__(
        self,
        source: Reader,
        target: RestrictedModel,
        columns: OutputColumns,
        weights: tuple[float, float, float],
    ) -> None:
        self._source, self.target, self._columns, self._weights = source, target, columns, weights

    def read(self, batch: DistillationBatch) -> TaughtBatch:
        """Make the teacher's predictions on a batch."""
        *shares, contrast = self._weights
        # Skip models whose weight is zero.
        taught, base, adapted = self.sides(batch, own=min(shares) < 1, base=contrast != 0)
        mixed = mix_teacher(taught.teacher, base, adapted, *map(jnp.float32, self._weights))
        taught = dataclasses.replace(taught, teacher=mixed)
        if not batch.text_share.any():
            return taught
        return mix_in_text(taught, self._columns.text_columns(batch), batch.text_share, batch.weight)

    def sides(
        self, batch: DistillationBatch, *, own: bool = True, base: bool = True
    ) -> tuple[TaughtBatch, jax.Array, jax.Array]:
        """Compute the parts of the teacher, each float32 (P, V) log-probabilities in the target's columns.

        They are the batch with the target's own predictions instead of the teacher's, and the source's predictions
        without and with its adapter. Without `own` or `base` a forward pass is skipped, and the predictions of the
        adapted source are returned in its place.
        """
        columns = self._columns
        read = jnp.asarray(batch.tokens_tgt), jnp.asarray(batch.mask_tgt), jnp.asarray(batch.at_tgt)
        found, spread = None, None
        if own or not self._source.complete:
            found = shared_log_probs(self.target, *read)
        if found is not None and not self._source.complete:
            spread = in_source_columns(found, columns)
        moves, weight = columns.moves(batch)
        shared, _, alone = columns.sizes
        sizes = shared, alone, len(columns.ends[0]) > 0
        sides = self._source.read(batch, spread, base=base)
        adapted = in_target_columns(sides[1], moves, sizes)
        plain = in_target_columns(sides[0], moves, sizes) if base else adapted
        return TaughtBatch(*read, weight, adapted if found is None else found), plain, adapted


@jax.jit
def mix_teacher(
    target: jax.Array,
    base: jax.Array,
    adapted: jax.Array,
    teacher_weight: jax.Array,
    sure_weight: jax.Array,
    contrast_weight: jax.Array,
) -> jax.Array:
    """Return the teacher's log-probabilities, float32 (P, V).

    log t = (1 - w) log p_tgt + w log p_adapted + contrast_weight (log p_adapted - log p_base), normalised,
    w = teacher_weight + (sure_weight - teacher_weight) exp(-H), with the entropy H of p_adapted in nats.

    If the adapted source is sure, the teacher follows it; if not, the target may know better. With both shares 0 the
    adapter's change in log-probability is added to the target's prediction; with both 1 and contrast_weight 0 the
    teacher is the adapted source. The change alone is not enough: it is relative to the source without its adapter,
    which may predict something different from the target.

    Target, base and adapted are log-probabilities (P, V) of the target, and of the source without and with its adapter;
    the weights are scalars.
    """
    entropy = -jnp.sum(jnp.exp(adapted) * adapted, axis=-1, keepdims=True)
    share = teacher_weight + (sure_weight - teacher_weight) * jnp.exp(-entropy)
    mixed = target + share * (adapted - target) + contrast_weight * (adapted - base)
    return jax.nn.log_softmax(mixed, axis=-1)


@jax.jit
def mix_in_text(taught: TaughtBatch, columns: jax.Array, share: jax.Array, weight: jax.Array) -> TaughtBatch:
    """Mix a one-hot prediction of the next symbol of the text into the teacher.

    `columns` is int32 (P,), the columns of the text's next tokens or -1; `share` and `weight` are float32 (P,). If the
    share is 1, the position keeps its full weight, even if the source reads the text as tokens that the target does not
    have.
    """
    told, every = columns >= 0, jnp.arange(taught.teacher.shape[1], dtype=jnp.int32)
    sure = jax.nn.log_softmax(jnp.where(every == columns[:, None], jnp.float32(0), jnp.float32(NEVER)), axis=-1)
    share = jnp.where(told, share, 0)[:, None]
    # log(0) where a side has no share: the other one is the sum.
    mixed = jnp.logaddexp(jnp.log1p(-share) + taught.teacher, jnp.log(share) + sure)
    weight = jnp.where(told & (share[:, 0] == 1), weight, taught.weight)
    return dataclasses.replace(taught, weight=weight, teacher=jnp.where(share > 0, mixed, taught.teacher))


@jax.jit
def weighted_kl(teacher: jax.Array, student: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum weight * KL(teacher || student) over positions; also return the sum of the weights."""
    kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return jnp.sum(jnp.where(weight > 0, weight * kl, 0)), jnp.sum(weight)
