"""The rows of embedding and head that really change, trimmed of all others, in the form in which PEFT stores them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jcrosslora.adapter.factors import LoRAFactors, update_norm
from jcrosslora.adapter.token_updates import EMBEDDING, MODULES, TIED, TokenUpdate
from jcrosslora.checkpoint.base import BaseModel


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
