"""How much of one base another holds, part by part: layers, dimensions, heads, neurons, tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.lineage.structure import Structure


@dataclass(frozen=True)
class Part:
    """One kind of part, counted over the layers that have a counterpart.

    Attributes:
        name: "layers", "stream dimensions", "heads", "key heads", "head features" (of v), "neurons" or "tokens".
        found: how many of the target's have a counterpart in the source; the fewest of any layer.
        target: how many the target has (in a layer).
        used: how many of the source's are somewhere in the target; the fewest of any layer.
        source: how many the source has (in a layer).
        in_order: whether they are in the source's order.
        repeated: whether one of the source's is in the target more than once.
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
        """Whether the whole of one base is in the other."""
        return self.found == self.target or self.used == self.source


def parts_of(structure: Structure, source: BaseModel, target: BaseModel) -> tuple[Part, ...]:
    """Count what two bases share; tokens only where their embeddings agree."""
    src, tgt = source.dims, target.dims
    layers = [layer for layer in structure.layers if layer is not None]
    order = np.array([-1 if layer is None else layer.layer for layer in structure.layers])
    width = tgt.head_dim
    found = [
        _part("layers", [order], tgt.layers, src.layers),
        _part("stream dimensions", [structure.stream], tgt.hidden, src.hidden),
        _part("heads", (_heads(layer.queries, width) for layer in layers), tgt.heads, src.heads),
        _part("key heads", (_heads(layer.keys, width) for layer in layers), tgt.kv_heads, src.kv_heads),
        _features((layer.attended.reshape(-1, width) for layer in layers), width),
        _part("neurons", (layer.neurons for layer in layers), tgt.intermediate, src.intermediate),
    ]
    if structure.by_embedding:
        # Which tokens are the same is known of a sample; the rest follows from the sizes of the tables.
        shared = min(src.vocab, tgt.vocab)
        ids_src, ids_tgt = structure.tokens
        ordered = bool((np.diff(ids_src[np.argsort(ids_tgt, kind="stable")]) > 0).all())
        found.append(Part("tokens", shared, tgt.vocab, shared, src.vocab, ordered, repeated=False))
    return tuple(found)


def _heads(rows: np.ndarray, width: int) -> np.ndarray:
    first = rows.reshape(-1, width)[:, 0]
    return np.where(first >= 0, first // width, -1)


def _features(heads: Iterable[np.ndarray], width: int) -> Part:
    """The values of a head: there with their head, if perhaps in another order."""
    in_order = all(bool((np.diff(head[head[:, 0] >= 0], axis=1) > 0).all()) for head in heads)
    return Part("head features", width, width, width, width, in_order, repeated=False)


def _part(name: str, layers: Iterable[np.ndarray], target: int, source: int) -> Part:
    """The fewest of any layer, and whether all are in order."""
    found, used, in_order, repeated = [], [], [], []
    for index in layers:
        there = index[index >= 0]
        found.append(len(there))
        used.append(len(np.unique(there)))
        repeated.append(used[-1] < found[-1])
        in_order.append(bool((np.diff(there) > 0).all()))
    return Part(name, min(found), target, min(used), source, all(in_order), any(repeated))
