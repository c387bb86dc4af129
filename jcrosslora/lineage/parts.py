"""Count how much of one base the other holds: layers, dimensions, heads, neurons, tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.lineage.structure import Structure


@dataclass(frozen=True)
class Part:
    """One kind of part, counted over the layers that have a counterpart.

    Attributes:
        name: "layers", "stream dimensions", "heads", "key heads", "head features" (of v_proj), "neurons" or "tokens".
        found: number of target parts with a counterpart in the source; the smallest of any layer.
        target: number of target parts (in a layer).
        used: number of source parts that occur in the target; the smallest of any layer.
        source: number of source parts (in a layer).
        in_order: whether they are in the source's order.
        repeated: whether a source part occurs in the target more than once.
    """

    name: str
    found: int
    target: int
    used: int
    source: int
    in_order: bool
    repeated: bool

    @property
    def nested(self) -> bool:
        """Whether one base contains all parts of the other."""
        return self.found == self.target or self.used == self.source


def count_parts(structure: Structure, source: BaseModel, target: BaseModel) -> tuple[Part, ...]:
    """Count the parts that two bases share; tokens only if their embeddings agree."""
    src, tgt = source.dims, target.dims
    layers = [layer for layer in structure.layers if layer is not None]
    order = np.array([-1 if layer is None else layer.layer for layer in structure.layers])
    size = tgt.head_dim
    found = [
        _count("layers", [order], tgt.layers, src.layers),
        _count("stream dimensions", [structure.stream], tgt.hidden, src.hidden),
        _count("heads", (_heads(layer.queries, size) for layer in layers), tgt.heads, src.heads),
        _count("key heads", (_heads(layer.keys, size) for layer in layers), tgt.kv_heads, src.kv_heads),
        _count_features((layer.attended.reshape(-1, size) for layer in layers), size),
        _count("neurons", (layer.neurons for layer in layers), tgt.intermediate, src.intermediate),
    ]
    if structure.by_embedding:
        # A sample shows whether tokens correspond; their number follows from the sizes of the embeddings.
        shared = min(src.vocab, tgt.vocab)
        ids_src, ids_tgt = structure.tokens
        in_order = bool((np.diff(ids_src[np.argsort(ids_tgt, kind="stable")]) > 0).all())
        found.append(Part("tokens", shared, tgt.vocab, shared, src.vocab, in_order, repeated=False))
    return tuple(found)


def _heads(rows: np.ndarray, size: int) -> np.ndarray:
    first = rows.reshape(-1, size)[:, 0]
    return np.where(first >= 0, first // size, -1)


def _count_features(heads: Iterable[np.ndarray], size: int) -> Part:
    """Count the value features of a head: complete whenever the head is there, perhaps in another order."""
    in_order = all(bool((np.diff(head[head[:, 0] >= 0], axis=1) > 0).all()) for head in heads)
    return Part("head features", size, size, size, size, in_order, repeated=False)


def _count(name: str, layers: Iterable[np.ndarray], target: int, source: int) -> Part:
    """Count one kind of part from its index arrays, one a layer."""
    found, used, in_order, repeated = [], [], [], []
    for index in layers:
        matched = index[index >= 0]
        found.append(len(matched))
        used.append(len(np.unique(matched)))
        repeated.append(used[-1] < found[-1])
        in_order.append(bool((np.diff(matched) > 0).all()))
    return Part(name, min(found), target, min(used), source, all(in_order), any(repeated))
