"""Read and write what an adapter file changes of the embedding and the output head.

peft stores these changes in four forms. LoRA of an embedding: `lora_embedding_A` (K, V) and `lora_embedding_B` (D, K),
which mean dE = s (B A)'. LoRA of the head: as of any linear layer. `modules_to_save`: the whole matrix.
`trainable_token_indices`: the new rows, in spite of their name `trainable_tokens_delta`, of the tokens that the
configuration lists; if the base ties the head to the embedding, they apply to both unless other tokens are listed for
the head.

Sources: peft 0.21, tuners/lora/layer.py, tuners/trainable_tokens/layer.py, utils/other.py.

In writing, factors stay a LoRA. A matrix of which most rows change is written whole, for `modules_to_save`; single
rows as `trainable_token_indices`. Rows are written in float32 unless the dtype of the file holds them exactly, because
the change is a small difference from the base's rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jcrosslora.adapter.changes import (
    EMBEDDING,
    HEAD,
    MODULES,
    TIED,
    LoRAFactors,
    TokenUpdate,
    changed_rows,
    complete_rows,
    low_rank_rows,
)
from jcrosslora.adapter.config import OLORA, PISSA, is_variant
from jcrosslora.adapter.contents import FileDtype, exact_dtype, file_factors, file_matrix
from jcrosslora.adapter.kinds.kind import AdapterFile, Kind, Update, read_or_reason
from jcrosslora.adapter.kinds.plain import PLAIN, read_embedding_factors
from jcrosslora.adapter.names import TensorName, by_module, ending
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import text_module_name
from jcrosslora.errors import AdapterError

_TABLES = {modules[0]: table for table, modules in MODULES.items() if table != TIED}


def read_tokens(
    kind: Kind, file: AdapterFile, head: Update | None
) -> tuple[tuple[TokenUpdate, ...], set[str], dict[str, str]]:
    """Read the changes of embedding and head in an opened file.

    Args:
        kind: of the adapter.
        file: with its base, without which nothing is read.
        head: the update of the output head, if there is one.

    Returns:
        The changes; the names of the tensors that they were read from, with "lm_head" for the head's; and for each kind
        of change that was not read the reason.
    """
    found: list[TokenUpdate] = []
    read: set[str] = set()
    reasons: dict[str, str] = {}
    kinds = ("embedding", "tokens", "full")
    parts = [(change, group) for change in kinds for group in by_module(file.extras.get(change, ()))]
    parts += [("head", [])] if head is not None else []
    for change, group in parts:
        update, why = read_or_reason(partial(_read, kind, file, change, group, head, found))
        if update is None:  # the rest of the adapter is still read
            reasons[change] = why
            continue
        read |= {tensor.key for tensor in group} or {HEAD}
        found += [update] if len(update.ids) else []
    return () if file.base is None else complete_rows(found, file.base), read, reasons


def _read(
    kind: Kind,
    file: AdapterFile,
    change: str,
    tensors: Sequence[TensorName],
    head: Update | None,
    found: Sequence[TokenUpdate],
) -> TokenUpdate:
    if file.base is None:
        msg = "the base that it was trained on was not given"
        raise AdapterError(msg)
    if head is not None and change == "head":
        update = _head(file, file.base, head)
    else:
        update = _of_tensors(kind, file, file.base, change, tensors)
    if any(set(update.modules) & set(other.modules) for other in found):
        msg = f"{update.table} is changed in another way as well"
        raise AdapterError(msg)
    return update


def _head(file: AdapterFile, base: BaseModel, head: Update) -> TokenUpdate:
    if base.tied and (is_variant(file.config, PISSA) or is_variant(file.config, OLORA)):
        msg = "it starts from factors of the matrix that the head shares with the embedding"
        raise AdapterError(msg)
    return _low_rank(HEAD, "head", base, head, file.rank)


def _of_tensors(
    kind: Kind, file: AdapterFile, base: BaseModel, change: str, tensors: Sequence[TensorName]
) -> TokenUpdate:
    module = tensors[0].module
    name = text_module_name(module)
    if name == base.family.own_embedding:
        msg = f"{name} is the embedding of {base.family.name}, whose changes are not read under this name"
        raise AdapterError(msg)
    table = _TABLES.get(name)
    if table is None or (change == "embedding" and table != EMBEDDING):
        msg = f"{module} is neither the embedding nor the output head"
        raise AdapterError(msg)
    if change == "embedding":
        if kind is not PLAIN:
            msg = f"{kind.name} of an embedding is not read"
            raise AdapterError(msg)
        return _low_rank(table, change, base, Update(read_embedding_factors(file, tensors)), file.rank)
    if len(tensors) != 1:
        msg = f"{module} has {len(tensors)} tensors, one was wanted"
        raise AdapterError(msg)
    rows = file.read(tensors[0].key)
    if change == "tokens":
        return _single_rows(file, base, table, rows)
    _check_shape(table, base, rows.shape)
    return changed_rows(table, "full", base, np.arange(len(rows)), rows)


def _low_rank(table: str, change: str, base: BaseModel, update: Update, rank: int | None) -> TokenUpdate:
    _check_shape(table, base, update.factors.shape)
    update = update.truncated(rank)
    return low_rank_rows(table, change, base.dims.vocab, np.arange(base.dims.vocab), update.factors, update.lost)


def _single_rows(file: AdapterFile, base: BaseModel, table: str, rows: np.ndarray) -> TokenUpdate:
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
    return changed_rows(table, "tokens", base, np.array(ids, np.int64)[order], rows[order])


def _listed(indices: object, table: str) -> object:
    """Return the tokens that a configuration lists for a matrix, None if none; a plain list is for the embedding."""
    if not isinstance(indices, Mapping):
        return indices if table == EMBEDDING else None
    module = MODULES[table][0]
    return next((ids for name, ids in indices.items() if module == name or module.endswith(f".{name}")), None)


def _check_shape(table: str, base: BaseModel, shape: tuple[int, ...]) -> None:
    wanted = base.dims.vocab, base.dims.hidden
    if shape != wanted:
        msg = f"{table} is {' x '.join(map(str, shape))}, in the base {base.name} it is {wanted[0]} x {wanted[1]}"
        raise AdapterError(msg)


def token_tensors(tokens: Sequence[TokenUpdate], dtype: FileDtype) -> dict[str, np.ndarray]:
    """Return the tensors of all changes by module and part.

    Raises:
        OutputError: values that are not finite or do not fit the dtype.
    """
    return {name: array for update in tokens for name, array in _tensors(update, dtype)}


def token_ranks(tokens: Sequence[TokenUpdate]) -> dict[str, int]:
    """Return the rank of each module that has a LoRA."""
    return {name: update.factors.rank for update in tokens if update.factors is not None for name in update.modules}


def token_config(tokens: Sequence[TokenUpdate]) -> dict[str, Any]:
    """Return the settings for rows and whole matrices; a LoRA needs none."""
    replaced = [update for update in tokens if update.rows is not None]
    whole = sorted(ending(name) for update in replaced if update.whole for name in update.modules)
    single = {ending(update.modules[0]): update.ids.tolist() for update in replaced if not update.whole}
    config: dict[str, Any] = {"modules_to_save": whole} if whole else {}
    return config | ({"trainable_token_indices": single} if single else {})


def _tensors(update: TokenUpdate, dtype: FileDtype) -> Iterator[tuple[str, np.ndarray]]:
    if update.factors is not None:
        b = np.zeros((update.size, update.factors.rank))
        b[update.ids] = np.asarray(update.factors.b).astype(np.float64)
        factors = LoRAFactors(a=update.factors.a, b=b, scale=update.factors.scale)
        for name in update.modules:
            a, b = file_factors(name, factors, dtype)
            if name in MODULES[EMBEDDING]:
                yield f"{name}.lora_embedding_A", np.ascontiguousarray(b.T)
                yield f"{name}.lora_embedding_B", np.ascontiguousarray(a.T)
            else:
                yield f"{name}.lora_A.weight", a
                yield f"{name}.lora_B.weight", b
        return
    assert update.rows is not None
    parts = [np.asarray(update.rows[part]) for part in update.parts()]
    kept = exact_dtype(parts, dtype)
    rows = np.concatenate([file_matrix(update.table, part.astype(np.float64), kept) for part in parts])
    # Single rows of a matrix that is embedding and head are written once: peft applies them to both.
    for name in update.modules if update.whole else update.modules[:1]:
        yield f"{name}.{'weight' if update.whole else 'token_adapter.trainable_tokens_delta'}", rows
