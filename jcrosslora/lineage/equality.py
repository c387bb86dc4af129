"""Whether two bases hold the same numbers throughout: the one question that no sample can answer."""

from collections.abc import Iterator

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.families import HEAD
from jcrosslora.checkpoint.layout import expected_shapes

_ROWS_AT_ONCE = 4096


def same_bytes(source: BaseModel, target: BaseModel) -> bool:
    """Whether the weight files of two bases are equal, byte by byte (by their SHA-256, unless their sizes differ)."""
    sizes = [[path.stat().st_size for path in base.store.files] for base in (source, target)]
    return sizes[0] == sizes[1] and source.digest() == target.digest()


def unequal_tensors(source: BaseModel, target: BaseModel) -> list[str]:
    """Names of the tensors of which two bases of one layout hold different numbers; all rows are read.

    What files hold beside the model's own tensors, such as the rotary frequencies of older ones, makes no difference.
    """
    fused = {base_module.tensor for base in (source, target) for base_module in base.modules.values()}
    names = [set(expected_shapes(base.family, base.dims, base.config)) for base in (source, target)]
    known = (names[0] | {HEAD}) & (names[1] | {HEAD})  # A head that is tied is there without being stored.
    found = []
    for name in sorted((names[0] | names[1]) - fused):
        if name not in known or not _equal(source, target, name):
            found.append(name)
    for name, module in target.modules.items():
        other = source.modules[name]
        firsts = [0 if item.rows is None else item.rows[0] for item in (other, module)]
        pieces = _pieces(module.shape[0])
        if not all(
            np.array_equal(source.rows(other.tensor, firsts[0] + ids), target.rows(module.tensor, firsts[1] + ids))
            for ids in pieces
        ):
            found.append(name)
        source.release()
        target.release()
    return found


def _equal(source: BaseModel, target: BaseModel, name: str) -> bool:
    shape, other = _shape(target, name), _shape(source, name)
    if shape != other:  # such as tables of different vocabularies
        return False
    if len(shape) != 2:
        return np.array_equal(source.tensor(name).astype(np.float32), target.tensor(name).astype(np.float32))
    return all(np.array_equal(source.rows(name, ids), target.rows(name, ids)) for ids in _pieces(shape[0]))


def _shape(base: BaseModel, name: str) -> tuple[int, ...]:
    return tuple(base.store.shape(base.embedding_name if name == HEAD and base.tied else name))


def _pieces(rows: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, _ROWS_AT_ONCE):
        yield np.arange(start, min(start + _ROWS_AT_ONCE, rows))
