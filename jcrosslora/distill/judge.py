"""Judge an update on held-out completions, without labels: divergence from the teacher, and agreement with the source.

The divergence is a mean over positions, but an answer is right only if all of its tokens are, so two fits with equal
divergence may differ in their number of right answers. The agreement is the share of the source's greedy answers that
the target would write too. The target writes an answer if each token, the end included, is the likeliest after the
tokens before it; one forward pass checks all tokens. An answer that goes on after it is complete, until it is cut off,
is compared up to where it is complete (`endings.complete_part`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import Tokenizer
from jcrosslora.decoder import likeliest
from jcrosslora.distill.batches import DistillationBatch, make_batches
from jcrosslora.distill.output_columns import OutputColumns
from jcrosslora.distill.sources.decoder import RestrictedModel, shared_log_probs
from jcrosslora.distill.teacher import TaughtBatch, weighted_kl
from jcrosslora.text import Completion


@flax.struct.dataclass
class AnswerBatch:
    """Greedy answers of the source as the target reads them.

    The shapes are (B, T), bool (B, T), flat positions (P,), and int32 (P,): the column of the answer's next symbol at
    each position, -1 if it is not compared.
    """

    tokens: jax.Array
    mask: jax.Array
    at: jax.Array
    wanted: jax.Array


def batch_answers(answers: Sequence[Completion], tokenizers: tuple[Tokenizer, Tokenizer]) -> list[DistillationBatch]:
    """Batch greedy answers of the source, with all of their tokens compared. Errors as for `make_batches`."""
    return make_batches([replace(one, taught="answer") for one in answers], tokenizers, 0.0) if answers else []


def answers_in_columns(batch: DistillationBatch, columns: OutputColumns) -> AnswerBatch:
    """Return a batch of `batch_answers` with the columns of its answers."""
    parts = batch.tokens_tgt, batch.mask_tgt, batch.at_tgt, columns.text_columns(batch)
    return AnswerBatch(*map(jnp.asarray, parts))


@dataclass(frozen=True, eq=False)
class Judge:
    """Held-out completions with the teacher's predictions, and the source's greedy answers to their prompts."""

    held_out: Sequence[TaughtBatch]
    answers: Sequence[AnswerBatch] = ()

    def judge(self, student: RestrictedModel) -> tuple[float, int, int]:
        """Return the divergence in nats a position, and the two numbers of `count_agreed`."""
        if not self._same_texts:
            return mean_kl(student, self.held_out), *count_agreed(student, self.answers)
        wanted = [one.wanted for one in self.answers]
        found = [_kl_and_hits(student, *both) for both in zip(self.held_out, wanted, strict=True)]
        return _mean([kl for kl, _ in found]), *_count_written(self.answers, [hits for _, hits in found])

    @cached_property
    def _same_texts(self) -> bool:
        """Whether the answers are the held-out texts themselves, so that one pass gives both figures."""
        return len(self.answers) == len(self.held_out) and all(
            np.array_equal(one.tokens, other.tokens) and np.array_equal(one.at, other.at)
            for one, other in zip(self.answers, self.held_out, strict=True)
        )


def mean_kl(student: RestrictedModel, batches: Sequence[TaughtBatch]) -> float:
    """Return the mean KL(teacher || target with its adapter), nats a position."""
    return _mean([_kl_and_hits(student, batch, jnp.full_like(batch.at, -1))[0] for batch in batches])


def count_agreed(student: RestrictedModel, batches: Sequence[AnswerBatch]) -> tuple[int, int]:
    """Return how many of the source's answers the updated target would also write, and how many answers there are."""
    return _count_written(batches, [_likeliest(student, batch) for batch in batches])


def _count_written(batches: Sequence[AnswerBatch], hits: Sequence[jax.Array]) -> tuple[int, int]:
    """Return how many answers have only hits, and how many there are; `hits` are bool (P,) for each batch."""
    judged = same = 0
    for batch, found in zip(batches, hits, strict=True):
        wanted, hit = np.asarray(batch.wanted) >= 0, np.asarray(found)
        rows = np.asarray(batch.at) // batch.tokens.shape[1]
        judged += len(answers := set(rows[wanted].tolist()))
        same += len(answers - set(rows[wanted & ~hit].tolist()))
    return same, judged


@jax.jit
def _likeliest(student: RestrictedModel, batch: AnswerBatch) -> jax.Array:
    """Check where the wanted symbol is the likeliest one, bool (P,)."""
    found = shared_log_probs(student, batch.tokens, batch.mask, batch.at)
    return likeliest(found) == batch.wanted


@jax.jit
def _kl_and_hits(
    student: RestrictedModel, batch: TaughtBatch, wanted: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Compute `weighted_kl` of a batch, and where the wanted symbol, int32 (P,), is the likeliest one, bool (P,)."""
    found = shared_log_probs(student, batch.tokens, batch.mask, batch.at)
    return weighted_kl(batch.teacher, found, batch.weight), likeliest(found) == wanted


def _mean(sums: Sequence[tuple[jax.Array, jax.Array]]) -> float:
    return float(sum(loss for loss, _ in sums) / sum(weight for _, weight in sums))
