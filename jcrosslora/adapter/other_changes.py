"""Read and write the changes of an adapter outside linear modules: embedding, head, norms, biases, whole layers.

peft stores changes of the embedding and the head in four forms:

- LoRA of the embedding: `lora_embedding_A` (K, V) and `lora_embedding_B` (D, K), dE = s (B A)';
- LoRA of the head, as of any linear layer;
- `modules_to_save`: the whole matrix;
- `trainable_token_indices`: the new rows of the listed tokens (not differences, in spite of the tensor's name,
  `trainable_tokens_delta`). If the base ties the head to the embedding, they apply to both, unless other tokens are
  listed for the head.

When writing, factors stay a LoRA. A matrix with mostly changed rows is written whole (`modules_to_save`), single rows
as `trainable_token_indices`.

Replaced tensors are under `modules_to_save` (norms, whole layers with their biases), `bias` (trained biases) and
`lora_bias` (b; s b is added to the base's bias).

Rows and tensors are written in float32 unless the file's dtype holds them exactly, because they differ little from the
base's.

Sources: peft 0.21, tuners/lora/layer.py, tuners/trainable_tokens/layer.py, utils/other.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from jcrosslora.adapter import changes
from jcrosslora.adapter.changes import EMBEDDING, HEAD, MODULES, TIED, LoRAFactors, ReplacedTensors, TokenUpdate
from jcrosslora.adapter.config import OLORA, PISSA, is_variant
from jcrosslora.adapter.contents import FileDtype, exact_dtype, file_factors, file_matrix
from jcrosslora.adapter.kinds.kind import ParsedAdapter, Update, read_or_reason
from jcrosslora.adapter.kinds.products import PLAIN, read_embedding_factors
from jcrosslora.adapter.names import TensorName, by_module, ending, file_scale
from jcrosslora.checkpoint import BaseModel, text_module_name
from jcrosslora.errors import AdapterError

_BIAS = ".bias"
_TABLES = {modules[0]: table for table, modules in MODULES.items() if table != TIED}


def read_tokens(file: ParsedAdapter, head: Update | None) -> tuple[tuple[TokenUpdate, ...], set[str], dict[str, str]]:
    """Read the changes of embedding and head in a file with a base; `head` is the update of the output head, or None.

    Returns the changes; the names of the tensors that they were read from, with "lm_head" for the head's; and the
    reason for each kind of change that was not read.
    """
    found: list[TokenUpdate] = []
    read: set[str] = set()
    reasons: dict[str, str] = {}
    kinds = ("embedding", "tokens", "full")
    parts = [(change, group) for change in kinds for group in by_module(file.extras.get(change, ()))]
    parts += [("head", [])] if head is not None else []
    for change, group in parts:
        update, why = read_or_reason(partial(_read_update, file, change, group, head, found))
        if update is None:  # the rest of the adapter is still read
            reasons[change] = why
            continue
        read |= {tensor.key for tensor in group} or {HEAD}
        found += [update] if len(update.ids) else []
    return () if file.base is None else changes.complete_rows(found, file.base), read, reasons


def _read_update(
    file: ParsedAdapter, change: str, tensors: Sequence[TensorName], head: Update | None, found: Sequence[TokenUpdate]
) -> TokenUpdate:
    base = _given_base(file)
    if head is not None and change == "head":
        update = _head(file, base, head)
    else:
        update = _of_tensors(file, base, change, tensors)
    if any(set(update.modules) & set(other.modules) for other in found):
        raise AdapterError(f"{update.table} is changed in another way as well")
    return update


def _head(file: ParsedAdapter, base: BaseModel, head: Update) -> TokenUpdate:
    if base.tied and (is_variant(file.config, PISSA) or is_variant(file.config, OLORA)):
        raise AdapterError("it starts from factors of the matrix that the head shares with the embedding")
    return _low_rank(HEAD, "head", base, head, file.rank)


def _of_tensors(file: ParsedAdapter, base: BaseModel, change: str, tensors: Sequence[TensorName]) -> TokenUpdate:
    module = tensors[0].module
    name = text_module_name(module)
    if name == base.family.own_embedding:
        raise AdapterError(f"{name} is the embedding of {base.family.name}, whose changes are not read under this name")
    table = _TABLES.get(name)
    if table is None or (change == "embedding" and table != EMBEDDING):
        raise AdapterError(f"{module} is neither the embedding nor the output head")
    if change == "embedding":
        if file.kind is not PLAIN:
            raise AdapterError(f"{file.kind.name} of an embedding is not read")
        # The head of a tied base uses the embedding with its LoRA in mlx_lm, and without it in peft.
        table = TIED if base.tied and file.origin.form == "MLX" else table
        return _low_rank(table, change, base, Update(read_embedding_factors(file, tensors)), file.rank)
    if len(tensors) != 1:
        raise AdapterError(f"{module} has {len(tensors)} tensors, expected one")
    rows = file.read(tensors[0].key)
    if change == "tokens":
        return _single_rows(file, base, table, rows)
    _check_shape(table, base, rows.shape)
    return changes.changed_rows(table, "full", base, np.arange(len(rows)), rows)


def _low_rank(table: str, change: str, base: BaseModel, update: Update, rank: int | None) -> TokenUpdate:
    _check_shape(table, base, update.factors.shape)
    update = update.truncated(rank)
    size = base.dims.vocab
    return changes.low_rank_rows(table, change, size, np.arange(size), update.factors, update.lost)


def _single_rows(file: ParsedAdapter, base: BaseModel, table: str, rows: np.ndarray) -> TokenUpdate:
    listed = file.config.get("trainable_token_indices")
    ids = _listed(listed, table)
    if (
        not isinstance(ids, list)
        or len(ids) != len(rows)
        or not all(type(index) is int and 0 <= index < base.dims.vocab for index in ids)
        or len(set(ids)) != len(ids)
    ):
        raise AdapterError(f"trainable_token_indices does not name {len(rows)} tokens of the base")
    _check_shape(table, base, (base.dims.vocab, rows.shape[1]))
    if table == EMBEDDING and base.tied and _listed(listed, HEAD) in (None, ids):
        table = TIED
    order = np.argsort(ids)
    return changes.changed_rows(table, "tokens", base, np.array(ids, np.int64)[order], rows[order])


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
    """Return the tensors of all changes by module and part; raises an OutputError if values do not fit the dtype."""
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


def read_replaced(
    file: ParsedAdapter, extras: Mapping[str, Sequence[TensorName]], updated: Mapping[str, object]
) -> tuple[tuple[ReplacedTensors, ...], set[str], dict[str, str]]:
    """Read the tensors that replace those of the base; without a base, none are read.

    Args:
        extras: tensors outside the updates of linear layers, by kind, without those of embedding and head.
        updated: the modules that have a low-rank update.

    Returns:
        The tensors; their names in the file; and the reason for each kind of change that was not read completely.
    """
    shapes = {} if file.base is None else file.base.tensor_shapes()
    found: dict[str, dict[str, np.ndarray]] = {}
    read: set[str] = set()
    reasons: dict[str, str] = {}
    for change in ("full", "bias", "lora_bias"):
        for tensor in extras.get(change, ()):
            taken = {*(f"{name}.weight" for name in updated), *(name for group in found.values() for name in group)}
            named, why = read_or_reason(partial(_read_change, file, tensor, shapes, taken))
            if named is None:  # the rest of the adapter is still read
                reasons[change] = why
                continue
            name, array = named
            found.setdefault(change, {})[name] = array
            read.add(tensor.key)
    return tuple(ReplacedTensors(change, tensors) for change, tensors in found.items()), read, reasons


def _read_change(
    file: ParsedAdapter, tensor: TensorName, shapes: Mapping[str, tuple[int, ...]], taken: set[str]
) -> tuple[str, np.ndarray]:
    base, module = _given_base(file), text_module_name(tensor.module)
    name = f"{module}.weight" if tensor.kind == "full" else f"{module}{_BIAS}"
    if name not in shapes:
        msg = f"the base {base.name} has no {name}"
        if tensor.kind == "lora_bias":
            msg += " to add it to, so what is written predicts something else: run the adapter unmerged, in peft"
        raise AdapterError(msg)
    array = file.read(tensor.key, axes=len(shapes[name]))
    if array.shape != shapes[name]:
        came, wanted = (" x ".join(map(str, shape)) for shape in (array.shape, shapes[name]))
        raise AdapterError(f"{name} is {came}, in the base {base.name} it is {wanted}")
    if tensor.kind == "lora_bias":
        if file.kind is not PLAIN:
            raise AdapterError(f"a bias of the LoRA is not read of a {file.kind.name}")
        # Added to the base's bias, in float32.
        change = file_scale(file.config, tensor.module) * array.astype(np.float64)
        array = (np.asarray(base.tensor(name)).astype(np.float64) + change).astype(np.float32)
    if name in taken:
        raise AdapterError(f"{name} is changed in another way as well")
    return name, array


def _given_base(file: ParsedAdapter) -> BaseModel:
    if file.base is None:
        raise AdapterError("the base that it was trained on was not given")
    return file.base


def replaced_tensors(
    replaced: Sequence[ReplacedTensors], adapted: Mapping[str, object], dtype: FileDtype
) -> dict[str, np.ndarray]:
    """Return the tensors by their names in the text model; raises an OutputError if values are not finite.

    peft keeps the biases of `adapted` modules, which have a LoRA, in their inner `base_layer`.
    """
    tensors = {}
    for name, array in (item for group in replaced for item in group.tensors.items()):
        module, array = _module(name), np.asarray(array)
        inner = name.endswith(_BIAS) and module in adapted
        cast = file_matrix(name, array.astype(np.float64), exact_dtype([array], dtype))
        tensors[f"{module}.base_layer{_BIAS}" if inner else name] = np.ascontiguousarray(cast)
    return tensors


def replaced_config(replaced: Sequence[ReplacedTensors], adapted: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings under which peft loads the tensors of `replaced_tensors`."""
    names = [name for group in replaced for name in group.tensors]
    # peft compares the ends of names, so a full name matches no other module.
    whole = sorted({_module(name) for name in names if not name.endswith(_BIAS)})
    biased = {_module(name) for name in names if name.endswith(_BIAS)} - set(whole)
    config: dict[str, Any] = {"modules_to_save": whole} if whole else {}
    return config | ({"bias": "all" if biased - set(adapted) else "lora_only"} if biased else {})


def _module(name: str) -> str:
    return name.rpartition(".")[0]
