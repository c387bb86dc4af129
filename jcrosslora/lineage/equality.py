"""Check whether two bases hold the same numbers throughout, which no sample can show."""

from collections.abc import Iterator

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import HEAD
from jcrosslora.checkpoint.layout import expected_shapes

_ROWS_AT_ONCE = 4096


def same_bytes(source: BaseModel, target: BaseModel) -> bool:
    """Return whether the weight files of two bases are equal, by size and SHA-256."""
    sizes = [[path.stat().st_size for path in base.store.files] for base in (source, target)]
    return sizes[0] == sizes[1] and source.digest() == target.digest()


def unequal_tensors(source: BaseModel, target: BaseModel) -> list[str]:
    """Read all rows of two bases of one layout and return the names of the tensors that differ.

    Tensors that the model does not use, such as the rotary frequencies in older files, are ignored.
    """
    in_modules = {module.tensor for base in (source, target) for module in base.modules.values()}
    names_src, names_tgt = (set(expected_shapes(base.family, base.dims, base.config)) for base in (source, target))
    shared = (names_src | {HEAD}) & (names_tgt | {HEAD})  # A tied head can be read although it is not stored.
    others = sorted((names_src | names_tgt) - in_modules)
    found = [name for name in others if name not in shared or not _equal(source, target, name)]
    for name, module in target.modules.items():
        other = source.modules[name]
        first_src, first_tgt = (0 if item.rows is None else item.rows[0] for item in (other, module))
        if not all(
            np.array_equal(source.rows(other.tensor, first_src + ids), target.rows(module.tensor, first_tgt + ids))
            for ids in _batches(module.shape[0])
        ):
            found.append(name)
        source.release()
        target.release()
    return found


def _equal(source: BaseModel, target: BaseModel, name: str) -> bool:
    shape, other = _shape(target, name), _shape(source, name)
    if shape != other:  # such as embeddings of different vocabularies
        return False
    if len(shape) != 2:
        return np.array_equal(source.tensor(name).astype(np.float32), target.tensor(name).astype(np.float32))
    return all(np.array_equal(source.rows(name, ids), target.rows(name, ids)) for ids in _batches(shape[0]))


def _shape(base: BaseModel, name: str) -> tuple[int, ...]:
    return tuple(base.store.shape(base.embedding_name if name == HEAD and base.tied else name))


def _batches(rows: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield np.arange(start, min(start + _ROWS_AT_ONCE, rows))
