"""Read what an adapter file changes of the embedding and the output head, where its base is there to compare with.

peft keeps four forms of them. LoRA of an embedding: `lora_embedding_A` (K, V) and `lora_embedding_B` (D, K), which mean
dE = s (B A)'. LoRA of the head: as of any linear layer. `modules_to_save`: the whole matrix. `trainable_token_indices`:
the rows themselves, in spite of their name `trainable_tokens_delta`, of the tokens that the configuration lists; where
the base ties the head to the embedding, they are those of both unless other tokens are listed for the head.

Sources: peft 0.21, tuners/lora/layer.py, tuners/trainable_tokens/layer.py, utils/other.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jcrosslora.adapter.dropped import by_module, embedding_factors
from jcrosslora.adapter.kinds.opened import AdapterFile
from jcrosslora.adapter.kinds.plain import PLAIN
from jcrosslora.adapter.kinds.record import Kind, Update
from jcrosslora.adapter.kinds.trim import cut
from jcrosslora.adapter.kinds.variants import OLORA, PISSA, VARIANTS
from jcrosslora.adapter.names import TensorName, text_module_name
from jcrosslora.adapter.norms import update_norm
from jcrosslora.adapter.token_updates import EMBEDDING, HEAD, MODULES, TIED, TokenUpdate
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.errors import AdapterError, JCrossLoRAError

_TABLES = {modules[0]: table for table, modules in MODULES.items() if table != TIED}


def read_tokens(
    kind: Kind, file: AdapterFile, dropped: Mapping[str, Sequence[TensorName]], head: Update | None
) -> tuple[tuple[TokenUpdate, ...], set[str], dict[str, str]]:
    """The changes of embedding and head in an opened file.

    Args:
        kind: of the adapter.
        file: with its base, without which nothing is read.
        dropped: tensors that are no part of a linear layer of the stack, by sort.
        head: the update of the output head, if there is one.

    Returns:
        The changes; the names of the tensors that they were read from, with "lm_head" for the head's; and for each sort
        of which something was not read the reason.
    """
    found: list[TokenUpdate] = []
    read: set[str] = set()
    reasons: dict[str, str] = {}
    parts = [(sort, group) for sort in ("embedding", "tokens", "full") for group in by_module(dropped.get(sort, ()))]
    parts += [("head", [])] if head is not None else []
    for sort, group in parts:
        try:
            with np.errstate(over="raise", invalid="raise"):
                update = _read(kind, file, sort, group, head)
            _check_alone(update, found)
        # As elsewhere for what does not move: whatever is wrong with it, the rest of the adapter is read.
        except (JCrossLoRAError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reasons[sort] = str(error) if isinstance(error, JCrossLoRAError) else "the file is damaged"
            continue
        read |= {tensor.key for tensor in group} or {HEAD}
        found += [update] if len(update.ids) else []
    return () if file.base is None else settled(found, file.base), read, reasons


def replaced_rows(table: str, sort: str, base: BaseModel, ids: np.ndarray, rows: np.ndarray) -> TokenUpdate:
    """Rows in place of those of a base, without those that are the same.

    Args:
        table: see `TokenUpdate`.
        sort: see `TokenUpdate`.
        base: whose rows are replaced.
        ids: int64 (m,), ascending.
        rows: (m, D), of any float dtype; one that differs from the base's by its rounding to this dtype is the same.
    """
    name, size = f"{MODULES[table][0]}.weight", base.dims.vocab
    update = TokenUpdate(table, sort, size, ids, rows=rows)
    changes, energy = np.zeros(len(ids), bool), 0.0
    for part in update.parts():
        old = base.rows(name, ids[part])
        with np.errstate(over="ignore"):
            changes[part] = (old.astype(rows.dtype) != rows[part]).any(axis=1)
        change = rows[part][changes[part]].astype(np.float64) - old[changes[part]]
        energy += float(np.sum(change**2))
    return TokenUpdate(table, sort, size, ids[changes], rows=rows[changes].astype(np.float32), energy=energy)


def settled(updates: Sequence[TokenUpdate], base: BaseModel) -> tuple[TokenUpdate, ...]:
    """Changes in the form in which PEFT holds them.

    Two that are the same are one, where the base has one matrix for both. Of a matrix most of whose rows are replaced
    all rows are given; also where rows of the embedding alone are replaced and the base ties the head to it, since peft
    gives single rows of such an embedding to the head as well.

    Args:
        updates: at most one of each matrix.
        base: that they are of.
    """
    if base.tied and len(updates) == 2 and updates[0].equals(updates[1]):
        first = min(updates, key=lambda update: update.table != EMBEDDING)
        updates = [dataclasses.replace(first, table=TIED)]
    return tuple(_completed(update, base) for update in updates)


def _completed(update: TokenUpdate, base: BaseModel) -> TokenUpdate:
    alone = update.table == EMBEDDING and base.tied
    if update.rows is None or update.whole or (2 * len(update.ids) <= update.size and not alone):
        return update
    every = np.arange(update.size)
    rows = base.rows(f"{update.modules[0]}.weight", every)
    rows[update.ids] = update.rows
    return dataclasses.replace(update, ids=every, rows=rows)


def _read(kind: Kind, file: AdapterFile, sort: str, tensors: Sequence[TensorName], head: Update | None) -> TokenUpdate:
    base = file.base
    if base is None:
        msg = "the base that it was trained on was not given"
        raise AdapterError(msg)
    if sort == "head":
        assert head is not None
        return _head(file, base, head)
    table = _TABLES.get(text_module_name(tensors[0].module))
    if table is None or (sort == "embedding" and table != EMBEDDING):
        msg = f"{tensors[0].module} is neither the embedding nor the output head"
        raise AdapterError(msg)
    if sort == "embedding":
        return _embedding(kind, file, base, tensors)
    if len(tensors) != 1:
        msg = f"{tensors[0].module} has {len(tensors)} tensors where one was wanted"
        raise AdapterError(msg)
    return _tokens(file, base, table, tensors[0]) if sort == "tokens" else _full(file, base, table, tensors[0])


def _head(file: AdapterFile, base: BaseModel, head: Update) -> TokenUpdate:
    if base.tied and (VARIANTS[PISSA](file.config) or VARIANTS[OLORA](file.config)):
        msg = "it starts from factors of the matrix that the head shares with the embedding"
        raise AdapterError(msg)
    return _low_rank(HEAD, "head", base, head, file.rank)


def _embedding(kind: Kind, file: AdapterFile, base: BaseModel, tensors: Sequence[TensorName]) -> TokenUpdate:
    if kind is not PLAIN:
        msg = f"{kind.name} of an embedding is not read"
        raise AdapterError(msg)
    return _low_rank(EMBEDDING, "embedding", base, Update(embedding_factors(file, tensors)), file.rank)


def _low_rank(table: str, sort: str, base: BaseModel, update: Update, rank: int | None) -> TokenUpdate:
    """The rows that factors of (V, D) change, with these factors."""
    _check_shape(table, base, update.factors.shape)
    update = cut(update, rank)
    b = np.asarray(update.factors.b)
    ids = np.flatnonzero(b.any(axis=1))
    factors = dataclasses.replace(update.factors, b=b[ids])
    return TokenUpdate(table, sort, base.dims.vocab, ids, factors, energy=update_norm(factors) ** 2, lost=update.lost)


def _full(file: AdapterFile, base: BaseModel, table: str, tensor: TensorName) -> TokenUpdate:
    rows = file.read(tensor.key)
    _check_shape(table, base, rows.shape)
    return replaced_rows(table, "full", base, np.arange(len(rows)), rows)


def _tokens(file: AdapterFile, base: BaseModel, table: str, tensor: TensorName) -> TokenUpdate:
    rows = file.read(tensor.key)
    listed = file.config.get("trainable_token_indices")
    ids = _listed(listed, table)
    if (
        not isinstance(ids, list)
        or len(ids) != len(rows)
        or not all(type(index) is int and 0 <= index < base.dims.vocab for index in ids)
        or len(set(ids)) != len(ids)
    ):
        msg = f"trainable_token_indices does not name {len(rows)} tokens of the base"
        raise AdapterError(msg)
    _check_shape(table, base, (base.dims.vocab, rows.shape[1]))
    if table == EMBEDDING and base.tied and _listed(listed, HEAD) in (None, ids):
        table = TIED
    order = np.argsort(ids)
    return replaced_rows(table, "tokens", base, np.array(ids, np.int64)[order], rows[order])


def _listed(indices: object, table: str) -> object:
    """The tokens that a configuration lists for a matrix, None if none; a plain list is for the embedding."""
    if not isinstance(indices, Mapping):
        return indices if table == EMBEDDING else None
    module = MODULES[table][0]
    return next((ids for name, ids in indices.items() if module == name or module.endswith(f".{name}")), None)


def _check_shape(table: str, base: BaseModel, shape: tuple[int, ...]) -> None:
    wanted = base.dims.vocab, base.dims.hidden
    if shape != wanted:
        msg = f"{table} is {' x '.join(map(str, shape))}, in the base {base.name} it is {wanted[0]} x {wanted[1]}"
        raise AdapterError(msg)


def _check_alone(update: TokenUpdate, found: Sequence[TokenUpdate]) -> None:
    if any(set(update.modules) & set(other.modules) for other in found):
        msg = f"{update.table} is changed in another way as well"
        raise AdapterError(msg)
