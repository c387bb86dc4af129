"""Record which dimension, layer, head and neuron of a source base each part of a target base corresponds to.

From this record come the shares of layers, dimensions, heads, neurons and tokens that have a counterpart.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from jcrosslora.checkpoint.layout import Module
from jcrosslora.relation.bases import Bases, Both, module_rows, some_of
from jcrosslora.relation.channels import ChannelScales, name_of

# The index arrays of a structure that hold the rows and the columns of each module.
_AXES: Mapping[str, tuple[str, str]] = {
    "q_proj": ("queries", "stream"),
    "k_proj": ("keys", "stream"),
    "v_proj": ("values", "stream"),
    "o_proj": ("stream", "attended"),
    "gate_proj": ("neurons", "stream"),
    "up_proj": ("neurons", "stream"),
    "down_proj": ("stream", "neurons"),
}


@dataclass(frozen=True, eq=False)
class LayerMap:
    """The source indices that one target layer is made of, -1 for parts without a counterpart.

    N heads, G key-value heads, D features of a head, I neurons, E experts. Arrays of parts that the layer does not have
    are empty.

    Attributes:
        queries: (N_tgt D,), rows of q_proj.
        keys: (G_tgt D,), rows of k_proj.
        values: (G_tgt D,), rows of v_proj.
        attended: (N_tgt D,), columns of o_proj.
        neurons: (I_tgt,), rows of gate_proj and up_proj, columns of down_proj.
        experts: (E_tgt,), experts; None in a layer without.
        in_place: role -> shape (O, I) of modules whose rows and columns correspond index by index.
    """

    layer: int
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    attended: np.ndarray
    neurons: np.ndarray
    experts: np.ndarray | None = None
    in_place: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The indices of the heads, the neurons and the experts, as far as the layer has them."""
        every = self.queries, self.neurons, self.experts
        return tuple(index for index in every if index is not None and len(index))


@dataclass(frozen=True, eq=False)
class Structure:
    """The source part that every part of a target base corresponds to.

    Attributes:
        stream: (H_tgt,), the source dimension of the residual stream, -1 for none.
        by_embedding: whether the embeddings determined `stream`; otherwise the same order is assumed.
        tokens: (T,) and (T,), sampled rows of the source and the target embedding that correspond.
        layers: a map for every target layer, None for a layer without a counterpart.
        scales: the channel scales between bases that correspond row by row; None if there are none.
    """

    bases: Bases
    stream: np.ndarray
    by_embedding: bool
    tokens: Both
    layers: tuple[LayerMap | None, ...]
    scales: ChannelScales | None = None

    @property
    def dimensions(self) -> Both:
        """Two (N,): the dimensions of the stream that correspond, in the source and in the target."""
        matched = np.flatnonzero(self.stream >= 0)
        return self.stream[matched], matched

    def matched(self) -> Iterator[tuple[int, LayerMap]]:
        """Yield the number and the map of every target layer that has a counterpart."""
        return ((number, layer) for number, layer in enumerate(self.layers) if layer is not None)

    def matched_experts(self) -> Iterator[tuple[tuple[int, int], Both]]:
        """Yield the source and the target layer, and the experts that correspond, of every layer with experts."""
        for number, layer in self.matched():
            if layer.experts is not None:
                matched = np.flatnonzero(layer.experts >= 0)
                yield (layer.layer, number), (layer.experts[matched], matched)

    def outputs(self, layer: int, role: str) -> np.ndarray | None:
        """Return (O_tgt,), the source row of every row of a target module; None if the layer has no counterpart."""
        return self._index(layer, role, 0)

    def inputs(self, layer: int, role: str) -> np.ndarray | None:
        """Return (I_tgt,), the source column of every column; None if the layer has no counterpart."""
        return self._index(layer, role, 1)

    def counterpart(self, module: Module) -> str | None:
        """Return the name of the source module of a target module; None if the source has none."""
        layer = self.layers[module.layer]
        name = None if layer is None else module.name.replace(f".{module.layer}.", f".{layer.layer}.", 1)
        return name if name in self.bases.source.modules else None

    def sample(self, module: Module, count: int) -> tuple[Both, Both] | None:
        """Read at most `count` evenly spaced rows of a target module that have a counterpart, and the counterparts.

        Returns for the source and for the target float32 (n, I) whole rows, see `finite`, and (m,) the columns that
        correspond; None if the module has no counterpart.
        """
        other = self.counterpart(module)
        outputs, inputs = self.outputs(module.layer, module.role), self.inputs(module.layer, module.role)
        if other is None or outputs is None or inputs is None or not (_some(outputs) and _some(inputs)):
            return None
        rows, columns = some_of(np.flatnonzero(outputs >= 0), count), np.flatnonzero(inputs >= 0)
        src = module_rows(self.bases.source, other, outputs[rows])
        return (src, inputs[columns]), (module_rows(self.bases.target, module.name, rows), columns)

    def factors(self, module: Module, count: int) -> np.ndarray | None:
        """Return the scales (n, I) of the source's numbers in a sample of a target module; None if there are none."""
        if self.scales is None:
            return None
        ids = some_of(np.arange(module.shape[0]), count)  # bases with scales are alike row by row
        return self.scales.factors(module.name, module.shape, ids)

    def explains(self, layer: int, name: str) -> bool:
        """Whether the channel scales include those of a layer's norm or other tensor."""
        return self.scales is not None and name_of(layer, name) in self.scales.gains

    @property
    def in_place(self) -> bool:
        """Whether every target module is the source module of the same name, row by row and without gaps."""
        source = self.bases.source
        if len(self.layers) != source.dims.layers or not _counts_up(self.stream, source.dims.hidden):
            return False
        axes = {
            axis: size
            for role, shape in source.architecture.role_shapes.items()
            if role in _AXES
            for axis, size in zip(_AXES[role], shape, strict=True)
            if axis != "stream"
        }
        return all(
            layer is not None
            and layer.layer == number
            and all(not len(index := getattr(layer, axis)) or _counts_up(index, size) for axis, size in axes.items())
            for number, layer in enumerate(self.layers)
        )

    @property
    def lacking(self) -> int:
        """Number of target layers whose attention, MLP or experts have no counterpart at all."""
        return sum(layer is None or not all(map(_some, layer.parts)) for layer in self.layers)

    def _index(self, layer: int, role: str, side: int) -> np.ndarray | None:
        found = self.layers[layer]
        if found is None:
            return None
        if role in found.in_place:
            return np.arange(found.in_place[role][side])
        axis = _AXES[role][side]
        return self.stream if axis == "stream" else getattr(found, axis)


def _some(index: np.ndarray) -> bool:
    return bool((index >= 0).any())


def _counts_up(index: np.ndarray, size: int) -> bool:
    return np.array_equal(index, np.arange(size))


@dataclass(frozen=True)
class Part:
    """One kind of part, counted over the layers that have a counterpart.

    Attributes:
        name: "layers", "stream dimensions", "heads", "key heads", "head features" (of v_proj), "neurons",
            "experts" or "tokens".
        found: number of target parts with a counterpart in the source; the smallest of any layer.
        target: number of target parts (in a layer).
        used: number of source parts that occur in the target; the smallest of any layer.
        source: number of source parts (in a layer).
        in_order: whether the target has them in the source's order.
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


def count_parts(structure: Structure) -> tuple[Part, ...]:
    """Count the parts that two bases share; tokens only if their embeddings agree."""
    src, tgt = (base.dims for base in structure.bases)
    layers = [layer for _, layer in structure.matched()]
    attend = [layer for layer in layers if len(layer.queries)]
    dense = [layer for layer in layers if len(layer.neurons)]
    sparse = [layer.experts for layer in layers if layer.experts is not None]
    order = np.array([-1 if layer is None else layer.layer for layer in structure.layers])
    size = tgt.head_dim
    found = [
        _count("layers", [order], tgt.layers, src.layers),
        _count("stream dimensions", [structure.stream], tgt.hidden, src.hidden),
    ]
    if attend:
        found += [
            _count("heads", (_heads(layer.queries, size) for layer in attend), tgt.heads, src.heads),
            _count("key heads", (_heads(layer.keys, size) for layer in attend), tgt.kv_heads, src.kv_heads),
            _count_features((layer.attended.reshape(-1, size) for layer in attend), size),
        ]
    if dense:
        found.append(_count("neurons", (layer.neurons for layer in dense), tgt.intermediate, src.intermediate))
    if sparse:
        experts_src, experts_tgt = (base.experts.shape("down")[0] for base in structure.bases)
        found.append(_count("experts", sparse, experts_tgt, experts_src))
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
