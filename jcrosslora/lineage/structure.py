"""Which dimension, layer, head and neuron of one base each of another base's is, whatever their order and number."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.layout import Module, role_shapes

# The index arrays of a layer that the rows and the columns of each module are counted by.
OUTPUTS: Mapping[str, str] = {
    "q_proj": "queries",
    "k_proj": "keys",
    "v_proj": "values",
    "o_proj": "stream",
    "gate_proj": "neurons",
    "up_proj": "neurons",
    "down_proj": "stream",
}
INPUTS: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "stream"),
    "o_proj": "attended",
    "down_proj": "neurons",
}


@dataclass(frozen=True, eq=False)
class LayerMap:
    """What one layer of the target is made of. Indices of the source, -1 where it has no counterpart.

    N heads, G key heads, D features of a head, I neurons.

    Attributes:
        layer: the source layer.
        queries: (N_tgt D,), rows of q.
        keys: (G_tgt D,), rows of k.
        values: (G_tgt D,), rows of v.
        attended: (N_tgt D,), columns of o.
        neurons: (I_tgt,), rows of gate and up, and columns of down.
    """

    layer: int
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    attended: np.ndarray
    neurons: np.ndarray


@dataclass(frozen=True, eq=False)
class Structure:
    """Where every part of a target base is in a source base.

    Attributes:
        stream: (H_tgt,), the source's dimension of the residual stream, -1 for none.
        by_embedding: whether the embeddings told it; else the dimensions are taken to be in the same order.
        tokens: (T,) and (T,), sampled rows of the source's and of the target's embedding that go together.
        layers: for every target layer what it is made of, None where the source has nothing like it.
    """

    stream: np.ndarray
    by_embedding: bool
    tokens: tuple[np.ndarray, np.ndarray]
    layers: tuple[LayerMap | None, ...]

    def outputs(self, layer: int, role: str) -> np.ndarray | None:
        """(O_tgt,): the source's row of every row of a target module; None where the layer has no counterpart."""
        return self._index(layer, OUTPUTS[role])

    def inputs(self, layer: int, role: str) -> np.ndarray | None:
        """(I_tgt,): the same of its columns."""
        return self._index(layer, INPUTS[role])

    def counterpart(self, module: Module) -> str | None:
        """The name of the source module of a target module; None where its layer has no counterpart."""
        layer = self.layers[module.layer]
        return None if layer is None else module.name.replace(f".{module.layer}.", f".{layer.layer}.", 1)

    def in_place(self, source: BaseModel) -> bool:
        """Whether every module of the target is the source's of the same name, row by row, and nothing is left out."""
        if len(self.layers) != source.dims.layers or len(self.stream) != source.dims.hidden:
            return False
        axes = {
            axis: size
            for role, shape in role_shapes(source.dims).items()
            for axis, size in zip((OUTPUTS[role], INPUTS[role]), shape, strict=True)
        }
        return np.array_equal(self.stream, np.arange(len(self.stream))) and all(
            layer is not None
            and layer.layer == place
            and all(
                np.array_equal(getattr(layer, axis), np.arange(size)) for axis, size in axes.items() if axis != "stream"
            )
            for place, layer in enumerate(self.layers)
        )

    def _index(self, layer: int, axis: str) -> np.ndarray | None:
        found = self.layers[layer]
        if found is None:
            return None
        return self.stream if axis == "stream" else getattr(found, axis)
