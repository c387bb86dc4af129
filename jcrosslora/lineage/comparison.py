"""The weights of two bases against each other, through the structure that they share: a sample of every tensor."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import FINAL_NORM, HEAD
from jcrosslora.lineage.difference import Difference, compare_rows
from jcrosslora.lineage.rounding import Rounding, float_rounding, rounding_of
from jcrosslora.lineage.sampling import even, finite, module_rows
from jcrosslora.lineage.structure import Structure

_ROWS = 64  # of each module
# Where that many rows show no low rank, a few modules are read further: adapters of rank 64 are in use.
_MORE_ROWS, _LOOKED_INTO = 512, 2


@dataclass(frozen=True)
class Compared:
    """A tensor of the target and its counterpart.

    Attributes:
        role: of a linear module, e.g. "q_proj"; or "embedding", "head", "norms", "biases".
        target: name of the module; of others the role.
        source: the same of the counterpart.
        difference: what became of it.
    """

    role: str
    target: str
    source: str
    difference: Difference


def compare_modules(source: BaseModel, target: BaseModel, structure: Structure) -> list[Compared]:
    """Compare 64 even rows of every linear module of the target that has a counterpart.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    found = []
    for module in target.modules.values():
        name = structure.counterpart(module)
        if name is None:
            continue
        difference = _module(source, target, structure, name, module.name, _ROWS)
        if difference is not None:
            found.append(Compared(module.role, module.name, name, difference))
        source.release()
        target.release()
    return _look_into_ranks(source, target, structure, found)


def compare_rest(source: BaseModel, target: BaseModel, structure: Structure) -> list[Compared]:
    """Compare the embedding and the head at the structure's tokens, and all norms and biases.

    Raises:
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    pieces = {
        "embedding": _table(source, target, structure, source.embedding_name),
        "head": None if source.tied and target.tied else _table(source, target, structure, HEAD),
        "norms": _vectors(_norms(source, target, structure)),
        "biases": _vectors(_biases(source, target, structure)),
    }
    return [Compared(role, role, role, piece) for role, piece in pieces.items() if piece is not None]


def _module(
    source: BaseModel, target: BaseModel, structure: Structure, name: str, target_name: str, rows: int
) -> Difference | None:
    module = target.modules[target_name]
    out, into = structure.outputs(module.layer, module.role), structure.inputs(module.layer, module.role)
    if out is None or into is None:
        return None
    some, columns = np.flatnonzero(out >= 0), np.flatnonzero(into >= 0)
    if not (len(some) and len(columns)):
        return None
    some = some[even(len(some), rows)]
    src = module_rows(source, name, out[some])
    tgt = module_rows(target, target_name, some)
    return _compare((src, source.modules[name].dtype, into[columns]), (tgt, module.dtype, columns))


def _compare(src: tuple[np.ndarray, str, np.ndarray], tgt: tuple[np.ndarray, str, np.ndarray]) -> Difference:
    """Compare columns of whole rows, each given with its stored dtype and the columns that go together."""
    x, y = src[0][:, src[2]], tgt[0][:, tgt[2]]
    if np.array_equal(x, y):  # what they were rounded from makes no difference
        return compare_rows(x, y, Rounding(x, x, src[1], coarse=False), Rounding(y, y, tgt[1], coarse=False))
    from_src, from_tgt = (_columns(rounding_of(rows, dtype), columns) for rows, dtype, columns in (src, tgt))
    return compare_rows(x, y, from_src, from_tgt)


def _columns(rounding: Rounding, columns: np.ndarray) -> Rounding:
    return replace(rounding, low=rounding.low[:, columns], high=rounding.high[:, columns])


def _look_into_ranks(
    source: BaseModel, target: BaseModel, structure: Structure, found: list[Compared]
) -> list[Compared]:
    """The same list, with more rows read of the first and the last module of each role that seems trained.

    If all of those turn out to be of low rank, the others of their roles are taken for that too, of a rank not known.
    """
    trained: dict[str, list[Compared]] = {}
    for item in found:
        if item.difference.change == "trained" and target.modules[item.target].shape[0] > _ROWS:
            trained.setdefault(item.role, []).append(item)
    closer: dict[str, Difference] = {}
    for items in trained.values():
        for place in even(len(items), _LOOKED_INTO):
            again = _module(source, target, structure, items[place].source, items[place].target, _MORE_ROWS)
            assert again is not None
            closer[items[place].target] = again
    if not closer or any(difference.change != "low rank" for difference in closer.values()):
        return found
    return [
        replace(item, difference=closer.get(item.target) or replace(item.difference, change="low rank"))
        if item in trained.get(item.role, ())
        else item
        for item in found
    ]


def _table(source: BaseModel, target: BaseModel, structure: Structure, name: str) -> Difference | None:
    """Rows of the embedding or of the head, where the embeddings showed which tokens are the same."""
    if not structure.by_embedding:
        return None
    columns = np.flatnonzero(structure.stream >= 0)
    into = structure.stream[columns]
    ids = (ids[even(len(ids), _ROWS)] for ids in structure.tokens)
    src, tgt = (finite(base, name, base.rows(name, own)) for base, own in zip((source, target), ids, strict=True))
    stored = (base.embedding_name if name != HEAD or base.tied else name for base in (source, target))
    dtypes = [base.store.dtype(own) for base, own in zip((source, target), stored, strict=True)]
    return _compare((src, dtypes[0], into), (tgt, dtypes[1], columns))


def _vectors(pairs: Iterator[tuple[np.ndarray, np.ndarray]]) -> Difference | None:
    """All vectors of one kind end to end, compared as a matrix of one row: no rank is to be seen in it."""
    both = list(pairs)
    if not both:
        return None
    src, tgt = (np.concatenate(side)[None, :].astype(np.float32) for side in zip(*both, strict=True))
    return compare_rows(src, tgt, float_rounding(src), float_rounding(tgt))


def _norms(source: BaseModel, target: BaseModel, structure: Structure) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gains of the norms that both families have, in the dimensions that both bases have."""
    there = structure.stream >= 0
    in_layer = [norm for norm in target.family.norms if norm in source.family.norms]
    names = [(FINAL_NORM, FINAL_NORM)]
    for number, layer in enumerate(structure.layers):
        if layer is not None:
            names += [
                (f"model.layers.{layer.layer}.{norm}.weight", f"model.layers.{number}.{norm}.weight")
                for norm in in_layer
            ]
    # As stored, and not as gains, where that means the same: a sum is rounded in another way than its parts.
    offset = np.float32(target.family.gain_offset - source.family.gain_offset)
    for name_src, name_tgt in names:
        src, tgt = _both((source, name_src), (target, name_tgt))
        tgt = tgt + offset
        yield src[structure.stream[there]], tgt[there]


def _biases(source: BaseModel, target: BaseModel, structure: Structure) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    has = set(source.tensor_names()), set(target.tensor_names())
    for module in target.modules.values():
        name, rows = structure.counterpart(module), structure.outputs(module.layer, module.role)
        if name is None or rows is None:
            continue
        name_src, name_tgt = f"{name}.bias", f"{module.name}.bias"
        if name_src in has[0] and name_tgt in has[1]:
            src, tgt = _both((source, name_src), (target, name_tgt))
            yield src[rows[rows >= 0]], tgt[rows >= 0]


def _both(*named: tuple[BaseModel, str]) -> Iterator[np.ndarray]:
    return (finite(base, name, base.tensor(name).astype(np.float32)) for base, name in named)
