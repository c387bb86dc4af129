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
from typing import Any

import numpy as np

from jcrosslora.adapter.contents import DTYPES, FileDtype, file_factors, file_matrix
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.config_tables import OLORA, PISSA, VARIANTS
from jcrosslora.adapter.kinds.kind import Kind, Update
from jcrosslora.adapter.kinds.plain import PLAIN, read_embedding_factors
from jcrosslora.adapter.kinds.truncate import truncate_update
from jcrosslora.adapter.names import TensorName, by_module, ending
from jcrosslora.adapter.token_updates import (
    EMBEDDING,
    HEAD,
    MODULES,
    TIED,
    TokenUpdate,
    changed_rows,
    complete_rows,
    low_rank_rows,
)
from jcrosslora.checkpoint.base import BaseModel
from jcrosslora.checkpoint.wrapped import text_module_name
from jcrosslora.errors import AdapterError, JCrossLoRAError

_TABLES = {modules[0]: table for table, modules in MODULES.items() if table != TIED}


def read_tokens(
    kind: Kind, file: AdapterFile, extras: Mapping[str, Sequence[TensorName]], head: Update | None
) -> tuple[tuple[TokenUpdate, ...], set[str], dict[str, str]]:
    """Read the changes of embedding and head in an opened file.

    Args:
        kind: of the adapter.
        file: with its base, without which nothing is read.
        extras: tensors that are not part of a linear layer's update, by kind.
        head: the update of the output head, if there is one.

    Returns:
        The changes; the names of the tensors that they were read from, with "lm_head" for the head's; and for each kind
        of change that was not read the reason.
    """
    found: list[TokenUpdate] = []
    read: set[str] = set()
    reasons: dict[str, str] = {}
    parts = [
        (change, group) for change in ("embedding", "tokens", "full") for group in by_module(extras.get(change, ()))
    ]
    parts += [("head", [])] if head is not None else []
    for change, group in parts:
        try:
            with np.errstate(over="raise", invalid="raise"):
                update = _read(kind, file, change, group, head)
            _check_alone(update, found)
        # A damaged change that cannot be read does not move; the rest of the adapter is still read.
        except (JCrossLoRAError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            reasons[change] = str(error) if isinstance(error, JCrossLoRAError) else "the file is damaged"
            continue
        read |= {tensor.key for tensor in group} or {HEAD}
        found += [update] if len(update.ids) else []
    return () if file.base is None else complete_rows(found, file.base), read, reasons


def _read(
    kind: Kind, file: AdapterFile, change: str, tensors: Sequence[TensorName], head: Update | None
) -> TokenUpdate:
    base = file.base
    if base is None:
        msg = "the base that it was trained on was not given"
        raise AdapterError(msg)
    if change == "head":
        assert head is not None
        return _head(file, base, head)
    name = text_module_name(tensors[0].module)
    if name == base.family.own_embedding:
        msg = f"{name} is the embedding of {base.family.name}, whose changes are not read under this name"
        raise AdapterError(msg)
    table = _TABLES.get(name)
    if table is None or (change == "embedding" and table != EMBEDDING):
        msg = f"{tensors[0].module} is neither the embedding nor the output head"
        raise AdapterError(msg)
    if change == "embedding":
        return _embedding(kind, file, base, tensors)
    if len(tensors) != 1:
        msg = f"{tensors[0].module} has {len(tensors)} tensors, one was wanted"
        raise AdapterError(msg)
    return _tokens(file, base, table, tensors[0]) if change == "tokens" else _full(file, base, table, tensors[0])


def _head(file: AdapterFile, base: BaseModel, head: Update) -> TokenUpdate:
    if base.tied and (VARIANTS[PISSA](file.config) or VARIANTS[OLORA](file.config)):
        msg = "it starts from factors of the matrix that the head shares with the embedding"
        raise AdapterError(msg)
    return _low_rank(HEAD, "head", base, head, file.rank)


def _embedding(kind: Kind, file: AdapterFile, base: BaseModel, tensors: Sequence[TensorName]) -> TokenUpdate:
    if kind is not PLAIN:
        msg = f"{kind.name} of an embedding is not read"
        raise AdapterError(msg)
    return _low_rank(EMBEDDING, "embedding", base, Update(read_embedding_factors(file, tensors)), file.rank)


def _low_rank(table: str, change: str, base: BaseModel, update: Update, rank: int | None) -> TokenUpdate:
    _check_shape(table, base, update.factors.shape)
    update = truncate_update(update, rank)
    return low_rank_rows(table, change, base.dims.vocab, np.arange(base.dims.vocab), update.factors, update.lost)


def _full(file: AdapterFile, base: BaseModel, table: str, tensor: TensorName) -> TokenUpdate:
    rows = file.read(tensor.key)
    _check_shape(table, base, rows.shape)
    return changed_rows(table, "full", base, np.arange(len(rows)), rows)


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


def _check_alone(update: TokenUpdate, found: Sequence[TokenUpdate]) -> None:
    if any(set(update.modules) & set(other.modules) for other in found):
        msg = f"{update.table} is changed in another way as well"
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
    rows = _rows(update, dtype)
    # Single rows of a matrix that is embedding and head are written once: peft applies them to both.
    for name in update.modules if update.whole else update.modules[:1]:
        yield f"{name}.{'weight' if update.whole else 'token_adapter.trainable_tokens_delta'}", rows


def _rows(update: TokenUpdate, dtype: FileDtype) -> np.ndarray:
    """Cast the rows to the dtype of the file if it holds them exactly, else to float32."""
    assert update.rows is not None
    with np.errstate(over="ignore", under="ignore"):
        parts = [np.asarray(update.rows[part]) for part in update.parts()]
        exact = all((rows.astype(DTYPES[dtype]).astype(rows.dtype) == rows).all() for rows in parts)
    kept = dtype if exact else "float32"
    return np.concatenate([file_matrix(update.table, rows.astype(np.float64), kept) for rows in parts])
