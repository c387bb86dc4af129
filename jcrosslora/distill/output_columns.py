"""Compare the predictions of two bases with different tokenizers over common output columns.

Most columns are shared tokens; one is the end of the text. The tokenizers may split the text after a position
differently: "int", "ent" in the source, "intent" in the target. Then the probability of the source's next token goes to
the target's next token; otherwise the target would learn to write "int" instead of "intent". The source's other
candidates are translated by how often their text is split that way in all answers: if the target always has "intent"
where the source has "int", all of the probability of "int" goes to "intent".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint.vocabulary import HasVocabulary, shared_ids
from jcrosslora.distill.batches import DistillationBatch, used_tokens
from jcrosslora.distill.sources.decoder import NO_TOKEN
from jcrosslora.errors import MethodError

_STEPS = 512, 256, 256  # what the numbers of columns are rounded up to
_SPLITS = 512  # what the number of splits is rounded up to
NEVER = -30.0  # log-probability of a column that one side cannot predict


@flax.struct.dataclass
class TokenSplits:
    """How answers are split differently: M pairs of source and target columns, int32 (M,), that start together.

    The share, float32 (M,), is how often the target has this token where the source has that one. Each count includes
    one extra occurrence at which both have the same token.
    """

    source: np.ndarray
    target: np.ndarray
    share: np.ndarray


class MassTransfer(NamedTuple):
    """How probability moves from the source's columns to the target's at P positions.

    Attributes:
        splits: for tokens other than the text's next token.
        said: int32 (P,), the column of the source's next token, which `splits` do not apply to; -1 if there is none.
        moved: int32 (P,), the column whose probability moves, or -1.
        to: int32 (P,), the target's column that receives it, or -1. Without `moved` it receives all of the probability.
    """

    splits: TokenSplits
    said: jax.Array
    moved: jax.Array
    to: jax.Array


class EosTokens(NamedTuple):
    """Ids of tokens of source and target that end a text.

    Attributes:
        stops: all of them. They do not count as shared tokens, because the end is a separate symbol.
        symbol: the ones merged into the end symbol; none on both sides if one side has none.
    """

    stops: tuple[Sequence[int], Sequence[int]] = ((), ())
    symbol: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


NO_SPLITS = TokenSplits(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))


@dataclass(frozen=True, eq=False)
class OutputColumns:
    """The output columns of a fit: on either side shared tokens, tokens of this side alone, and the end.

    Attributes:
        shared: ids of the shared tokens in source and target, int32 (V,) each.
        own: ids of tokens that only one side has and that occur in the text, int32 (S,) and (E,), ascending.
        ends: ids of the tokens that end a text on each side, together one symbol; none on both sides if one has none.
        rounded: whether the shared and the own columns are padded to multiples of 512 and 256, so that fits to
            different texts have the same shapes and share compiled programs.
        splits: how the target splits the text of the source's tokens, if differently.
    """

    shared: tuple[np.ndarray, np.ndarray]
    own: tuple[np.ndarray, np.ndarray]
    ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    rounded: bool = False
    splits: TokenSplits = NO_SPLITS

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of columns of shared, source-only and target-only tokens."""
        counts = len(self.shared[0]), len(self.own[0]), len(self.own[1])
        if not self.rounded:
            return counts
        shared, src, tgt = (-(-count // step) * step for count, step in zip(counts, _STEPS, strict=True))
        return shared, src, tgt

    def tokens(self, side: int) -> np.ndarray:
        """Return the token ids of a side's columns, int32, without the end; `NO_TOKEN` for padding columns."""
        shared, *own = self.sizes
        columns = (self.shared[side], shared), (self.own[side], own[side])
        filled = (np.pad(ids, (0, count - len(ids)), constant_values=NO_TOKEN) for ids, count in columns)
        return np.concatenate([*filled])

    def head_rows(self, side: int) -> np.ndarray:
        """Return the token ids of a side's output head: one for each column, then the tokens that end a text."""
        return np.concatenate([self.tokens(side), np.array(self.ends[side], np.int32)])

    def moves(self, batch: DistillationBatch) -> tuple[MassTransfer, jax.Array]:
        """Find what moves at each position of a batch, with float32 (P,) weights, 0 where a next token has no column.

        Where only the target has a position, all probability goes to its next token: the text itself is the teacher.
        """
        src, tgt = self.following(batch, 0), self.following(batch, 1)
        known = (batch.next_src >= 0) & (batch.next_tgt >= 0)
        same = known & (src == tgt) & (src >= 0) & (src < self.sizes[0])
        moves = known & ~same
        alone = (batch.next_src < 0) & (batch.next_tgt >= 0)
        # The source did not write the prompts, so their splits teach nothing.
        lost = (moves & (~batch.answer | (src < 0) | (tgt < 0))) | (alone & (tgt < 0))
        moved = np.where(moves & ~lost, src, -1).astype(np.int32)
        to = np.where((moves | alone) & ~lost, tgt, -1).astype(np.int32)
        weight = np.where(lost, 0, batch.weight).astype(np.float32)
        return MassTransfer(self.splits, *map(jnp.asarray, (src, moved, to))), jnp.asarray(weight)

    def following(self, batch: DistillationBatch, side: int = 1) -> np.ndarray:
        """Return int32 (P,) the columns of a side's next tokens, -1 where there is none or it has no column."""
        tokens, ids = (batch.next_src, batch.next_tgt)[side], self.tokens(side)
        order = np.argsort(ids)
        found = np.minimum(np.searchsorted(ids[order], tokens), max(0, len(ids) - 1))
        places = order[found]
        return np.where((ids[places] == tokens) & (tokens >= 0), places, -1).astype(np.int32)

    def text_columns(self, batch: DistillationBatch) -> np.ndarray:
        """Return int32 (P,): the column of the target's next symbol where `text_share` is above 0, else -1."""
        shared, _, own = self.sizes
        end = shared + own if self.ends[1] else -1
        found = np.where(batch.next_tgt < 0, end, self.following(batch))
        return np.where(batch.text_share != 0, found, -1).astype(np.int32)


def find_columns(
    source: HasVocabulary,
    target: HasVocabulary,
    batches: Sequence[DistillationBatch],
    commonest: int,
    ends: EosTokens = EosTokens(),  # noqa: B008
    *,
    rounded: bool = False,
) -> OutputColumns:
    """Choose the columns: shared tokens that are in the batches or common, and tokens of one side in the answers.

    The tokens of byte-pair encodings are numbered in the order in which they were merged: low ids are frequent.

    Args:
        batches: all batches of the fit.
        commonest: how many of the source's lowest ids to take, whether they occur or not.
        rounded: see `OutputColumns`; the source's reader then has to know `NO_TOKEN`.

    Raises:
        MethodError: a vocabulary cannot be read, or the two share too few tokens.
    """
    ids, reason = shared_ids(source, target)
    if ids is None:
        raise MethodError(f"predictions cannot be compared: {reason}; use another method")
    order = np.argsort(ids[0])
    ids_src, ids_tgt = (side[order].astype(np.int32) for side in ids)
    kept = np.isin(ids_src, used_tokens(batches, 0)) | np.isin(ids_tgt, used_tokens(batches, 1))
    kept |= np.arange(len(ids_src)) < commonest
    stops = [list(side) for side in ends.stops]
    kept &= ~np.isin(ids_src, stops[0]) & ~np.isin(ids_tgt, stops[1])
    shared = ids_src[kept], ids_tgt[kept]
    own = []
    for side in (0, 1):
        tokens = np.concatenate([(batch.next_src, batch.next_tgt)[side][batch.answer] for batch in batches])
        own.append(np.setdiff1d(tokens[tokens >= 0], np.concatenate([shared[side], stops[side]])).astype(np.int32))
    found = OutputColumns(shared, (own[0], own[1]), ends.symbol, rounded)
    return replace(found, splits=_count_splits(found, batches))


def _count_splits(columns: OutputColumns, batches: Sequence[DistillationBatch]) -> TokenSplits:
    """Count, in answers, which target tokens begin at the same character as each source token."""
    src, tgt = (np.concatenate([columns.following(batch, side)[batch.answer] for batch in batches]) for side in (0, 1))
    known = (src >= 0) & (tgt >= 0)
    (source, target), counts = np.unique(np.stack([src, tgt])[:, known], axis=1, return_counts=True)
    whole = np.bincount(src[known], minlength=len(columns.tokens(0)))
    share = counts / (whole[source] + 1)
    differ = (source != target) | (source >= columns.sizes[0])
    empty = -int(differ.sum()) % _SPLITS if columns.rounded else 0
    return TokenSplits(
        np.pad(source[differ].astype(np.int32), (0, empty)),
        np.pad(target[differ].astype(np.int32), (0, empty)),
        np.pad(share[differ].astype(np.float32), (0, empty)),
    )


@partial(jax.jit, static_argnames="sizes")
def in_target_columns(source: jax.Array, moves: MassTransfer, sizes: tuple[int, int, bool]) -> jax.Array:
    """Translate the source's predictions to the target's columns: float32 (P, shared + own + end).

    `source` float32 (P, C) are log-probabilities of the source's columns; `sizes` are the numbers of shared and
    target-only tokens, and whether the last column is the end of the text.
    """
    (splits, said, moved, to), (shared, own, end) = moves, sizes
    # Columns first, so that a split adds whole rows.
    probability = jnp.exp(source).T
    part = probability[splits.source] * jnp.where(splits.source[:, None] == said, 0, splits.share[:, None])
    none = jnp.zeros((own, len(source)), source.dtype)
    found = jnp.concatenate([probability[:shared], none, probability[len(probability) - end :]])
    left = jnp.where(splits.source < shared, splits.source, len(found))
    found = found.at[splits.target].add(part).at[left].add(-part, mode="drop")
    found = jnp.log(jnp.maximum(found, math.exp(NEVER))).T
    rows, shifts, alone = jnp.arange(len(source)), (moved >= 0) & (to >= 0), (moved < 0) & (to >= 0)
    mass = jnp.take_along_axis(source, jnp.maximum(moved, 0)[:, None], axis=1)[:, 0]
    place = jnp.maximum(to, 0)
    emptied = jnp.arange(found.shape[1])[None] == jnp.where(shifts & (moved < shared), moved, -1)[:, None]
    found = jnp.where(emptied | alone[:, None], NEVER, found)
    added = jnp.where(alone, 0.0, jnp.logaddexp(found[rows, place], mass))
    found = found.at[rows, place].set(jnp.where(shifts | alone, added, found[rows, place]))
    return jax.nn.log_softmax(jnp.maximum(found, NEVER), axis=-1)


def in_source_columns(target: jax.Array, columns: OutputColumns) -> jax.Array:
    """Translate the target's predictions (P, C) to the source's columns, float32 (P, shared + own + end).

    Source-only tokens get no probability.
    """
    (shared, own, _), end = columns.sizes, len(columns.ends[1]) > 0
    never = jnp.full((len(target), own), NEVER, target.dtype)
    return jnp.concatenate([target[:, :shared], never, target[:, target.shape[1] - end :]], axis=1)
