"""Match the layers of two bases that have the same parts beyond attention and a dense MLP: each with its own number.

The parts of such layers, as heads with a state or experts, are not searched in other places.
"""

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.family.parts import LayerParts
from jcrosslora.lineage.matching import MIN_MEAN_COSINE
from jcrosslora.lineage.structure import LayerMap
from jcrosslora.lineage.weight_similarity import cosine_similarity, evenly_spaced, module_rows

_ROWS = 16  # of each module that is looked at


def has_other_parts(base: BaseModel) -> bool:
    """Whether a base has layers of other parts than attention and a dense MLP."""
    return set(base.parts) != {LayerParts()}


def same_parts(source: BaseModel, target: BaseModel) -> bool:
    """Whether two bases have the same modules of the same shapes in layers of the same parts."""
    shapes = [{name: (one.role, one.shape) for name, one in base.modules.items()} for base in (source, target)]
    return source.parts == target.parts and shapes[0] == shapes[1]


def layers_in_place(source: BaseModel, target: BaseModel) -> tuple[LayerMap | None, ...]:
    """Return the map of every layer, None for a layer that does not resemble the one of its number.

    Args:
        source: the base that adapters come from.
        target: the base that they go to, with `same_parts`.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    dims = target.dims
    queries, keys = np.arange(dims.heads * dims.head_dim), np.arange(dims.kv_heads * dims.head_dim)
    found: list[LayerMap | None] = []
    for layer in range(dims.layers):
        names = [name for name, module in target.modules.items() if module.layer == layer]
        cosine = np.mean([_cosine(source, target, name) for name in names])
        shapes = {target.modules[name].role: target.modules[name].shape for name in names}
        whole = LayerMap(layer, queries, keys, keys, queries, np.arange(dims.intermediate), shapes)
        found.append(whole if cosine >= MIN_MEAN_COSINE else None)
        source.release()
        target.release()
    return tuple(found)


def _cosine(source: BaseModel, target: BaseModel, name: str) -> float:
    rows = evenly_spaced(target.modules[name].shape[0], _ROWS)
    return cosine_similarity(module_rows(source, name, rows), module_rows(target, name, rows))
