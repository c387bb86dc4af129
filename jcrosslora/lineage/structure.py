"""Record which dimension, layer, head and neuron of a source base each part of a target base corresponds to."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.layout import Module, role_shapes

# The index array of a structure that holds the rows (_OUTPUTS) and the columns (_INPUTS) of each module.
_OUTPUTS: Mapping[str, str] = {
    "q_proj": "queries",
    "k_proj": "keys",
    "v_proj": "values",
    "o_proj": "stream",
    "gate_proj": "neurons",
    "up_proj": "neurons",
    "down_proj": "stream",
}
_INPUTS: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "stream"),
    "o_proj": "attended",
    "down_proj": "neurons",
}


@dataclass(frozen=True, eq=False)
class LayerMap:
    """The source indices that one target layer is made of, -1 for parts without a counterpart.

    N heads, G key-value heads, D features of a head, I neurons.

    Attributes:
        layer: the source layer.
        queries: (N_tgt D,), rows of q_proj.
        keys: (G_tgt D,), rows of k_proj.
        values: (G_tgt D,), rows of v_proj.
        attended: (N_tgt D,), columns of o_proj.
        neurons: (I_tgt,), rows of gate_proj and up_proj, columns of down_proj.
    """

    layer: int
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    attended: np.ndarray
    neurons: np.ndarray


@dataclass(frozen=True, eq=False)
class Structure:
    """The source part that every part of a target base corresponds to.

    Attributes:
        stream: (H_tgt,), the source dimension of the residual stream, -1 for none.
        by_embedding: whether the embeddings determined `stream`; otherwise the same order is assumed.
        tokens: (T,) and (T,), sampled rows of the source and the target embedding that correspond.
        layers: a map for every target layer, None for a layer without a counterpart.
    """

    stream: np.ndarray
    by_embedding: bool
    tokens: tuple[np.ndarray, np.ndarray]
    layers: tuple[LayerMap | None, ...]

    def outputs(self, layer: int, role: str) -> np.ndarray | None:
        """Return (O_tgt,), the source row of every row of a target module; None if the layer has no counterpart."""
        return self._index(layer, _OUTPUTS[role])

    def inputs(self, layer: int, role: str) -> np.ndarray | None:
        """Return (I_tgt,), the source column of every column; None if the layer has no counterpart."""
        return self._index(layer, _INPUTS[role])

    def counterpart(self, module: Module) -> str | None:
        """Return the name of the source module of a target module; None if its layer has no counterpart."""
        layer = self.layers[module.layer]
        return None if layer is None else module.name.replace(f".{module.layer}.", f".{layer.layer}.", 1)

    def in_place(self, source: BaseModel) -> bool:
        """Return whether every target module is the source module of the same name, row by row and without gaps."""
        if len(self.layers) != source.dims.layers or len(self.stream) != source.dims.hidden:
            return False
        axes = {
            axis: size
            for role, shape in role_shapes(source.dims).items()
            for axis, size in zip((_OUTPUTS[role], _INPUTS[role]), shape, strict=True)
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
