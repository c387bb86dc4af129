"""What an adapter changes of the embedding and of the output head: rows of matrices with one row for each token.

V tokens, D the width of the residual stream, n the tokens whose rows change. Rows that do not really change are
trimmed.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jcrosslora.adapter.factors import Array, LoRAFactors, update_norm
from jcrosslora.adapter.pytrees import register_change
from jcrosslora.checkpoint.base import BaseModel

EMBEDDING, HEAD = "embed_tokens", "lm_head"
# Both, if the base has one matrix for the two and the adapter one change.
TIED = "tied"
MODULES: Mapping[str, tuple[str, ...]] = {
    EMBEDDING: ("model.embed_tokens",),
    HEAD: ("lm_head",),
    TIED: ("model.embed_tokens", "lm_head"),
}
_AT_ONCE = 4096  # rows


@register_change(arrays=("factors", "rows"), account=("energy", "lost", "share"))
@dataclass(frozen=True, eq=False)
class TokenUpdate:
    """The change of an embedding, of an output head, or of the one matrix that is both, as a pytree.

    Exactly one of `factors` and `rows` is given; their arrays are the leaves.

    Attributes:
        table: the matrix that changes, a key of `MODULES`.
        kind: the tensors that it was read from, a key of `ignored.CHANGES`.
        size: V.
        ids: int64 (n,), ascending. Static: they are places, which gradients reject and arithmetic over leaves would
            change.
        factors: of the change of the rows: a (K, D), b (n, K).
        rows: float32 (n, D), the new rows. All V of them replace the whole matrix.
        energy: squared Frobenius norm of the change.
        lost: squared Frobenius norm that truncation removed when it was read.
        share: `energy` and `lost` over the same of the whole adapter that it was read from; 0 after a transfer.
    """

    table: str
    kind: str
    size: int
    ids: np.ndarray
    factors: LoRAFactors | None = None
    rows: Array | None = None
    energy: float = 0.0
    lost: float = 0.0
    share: float = 0.0

    def __repr__(self) -> str:
        """Table, kind and sizes, on one line."""
        form = "rows" if self.factors is None else f"factors of rank {self.factors.rank}"
        return f"TokenUpdate({self.table}, {self.kind}, {form} for {len(self.ids)} of {self.size} tokens)"

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that change."""
        return MODULES[self.table]

    @property
    def width(self) -> int:
        """D."""
        matrix = self.rows if self.factors is None else self.factors.a
        assert matrix is not None
        return matrix.shape[-1]

    @property
    def whole(self) -> bool:
        """Whether it replaces the whole matrix of the base."""
        return self.rows is not None and len(self.ids) == self.size

    @property
    def numbers(self) -> int:
        """The number of array elements that it holds."""
        arrays = (self.rows,) if self.factors is None else (self.factors.a, self.factors.b)
        return sum(array.size for array in arrays if array is not None)

    def parts(self) -> Iterator[slice]:
        """Split the n rows into slices of a few thousand."""
        for start in range(0, len(self.ids), _AT_ONCE):
            yield slice(start, min(start + _AT_ONCE, len(self.ids)))

    def changed(self, old: np.ndarray, part: slice) -> np.ndarray:
        """Compute the new rows, float64 (m, D).

        Args:
            old: (m, D), the base's rows of the tokens `ids[part]`.
            part: of the n rows.
        """
        if self.rows is not None:
            return np.asarray(self.rows[part]).astype(np.float64)
        assert self.factors is not None
        b = np.asarray(self.factors.b)[part].astype(np.float64) * self.factors.scale
        return old.astype(np.float64) + b @ np.asarray(self.factors.a).astype(np.float64)

    def same_change(self, other: "TokenUpdate") -> bool:
        """Whether both change the same rows in the same way, whichever table they belong to."""
        return np.array_equal(self.ids, other.ids) and all(
            (one is None) == (two is None) and (one is None or np.array_equal(np.asarray(one), np.asarray(two)))
            for one, two in zip(_arrays(self), _arrays(other), strict=True)
        )


def _arrays(update: TokenUpdate) -> tuple:
    factors = update.factors
    return (update.rows, *((None, None, None) if factors is None else (factors.a, factors.b, factors.scale)))


def low_rank_rows(
    table: str, kind: str, size: int, ids: np.ndarray, factors: LoRAFactors, lost: float = 0.0
) -> TokenUpdate:
    """Change rows by factors, without the rows that factors leave as they are.

    Args:
        table: see `TokenUpdate`.
        kind: see `TokenUpdate`.
        size: V.
        ids: int64 (m,), the tokens of the rows of b, ascending.
        factors: a (K, D), b (m, K).
        lost: see `TokenUpdate`.
    """
    b = np.asarray(factors.b)
    changes = b.any(axis=1)
    factors = dataclasses.replace(factors, b=b[changes])
    return TokenUpdate(table, kind, size, ids[changes], factors, energy=update_norm(factors) ** 2, lost=lost)


def changed_rows(table: str, kind: str, base: BaseModel, ids: np.ndarray, rows: np.ndarray) -> TokenUpdate:
    """Replace rows of a base, without the rows that stay the same.

    Args:
        table: see `TokenUpdate`.
        kind: see `TokenUpdate`.
        base: whose rows are replaced.
        ids: int64 (m,), ascending.
        rows: (m, D), of any float dtype; a row that equals the base's after rounding to this dtype stays the same.
    """
    name, size = f"{MODULES[table][0]}.weight", base.dims.vocab
    changes, energy = np.zeros(len(ids), bool), 0.0
    for part in TokenUpdate(table, kind, size, ids, rows=rows).parts():
        old = base.rows(name, ids[part])
        with np.errstate(over="ignore"):
            changes[part] = (old.astype(rows.dtype) != rows[part]).any(axis=1)
        change = rows[part][changes[part]].astype(np.float64) - old[changes[part]]
        energy += float(np.sum(change**2))
    return TokenUpdate(table, kind, size, ids[changes], rows=rows[changes].astype(np.float32), energy=energy)


def complete_rows(updates: Sequence[TokenUpdate], base: BaseModel) -> tuple[TokenUpdate, ...]:
    """Bring changes into the form in which PEFT stores them.

    Two equal changes become one if the base has one matrix for embedding and head. All rows are given if most of them
    are replaced; and also if rows of the embedding alone are replaced and the base ties the head to it, since peft
    applies single rows of such an embedding to the head as well.

    Args:
        updates: at most one of each matrix.
        base: that they belong to.
    """
    if base.tied and len(updates) == 2 and updates[0].same_change(updates[1]):
        first = min(updates, key=lambda update: update.table != EMBEDDING)
        updates = [dataclasses.replace(first, table=TIED)]
    return tuple(_completed(update, base) for update in updates)


def _completed(update: TokenUpdate, base: BaseModel) -> TokenUpdate:
    embedding_alone = update.table == EMBEDDING and base.tied
    few = 2 * len(update.ids) <= update.size
    if update.rows is None or update.whole or (few and not embedding_alone):
        return update
    every = np.arange(update.size)
    rows = base.rows(f"{update.modules[0]}.weight", every)
    rows[update.ids] = update.rows
    return dataclasses.replace(update, ids=every, rows=rows)
