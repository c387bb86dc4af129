"""Match the layers of two bases with other parts than attention and a dense MLP: whole layers, of the same modules.

The parts of such layers, as heads with a state, are not searched in other places; experts are.
"""

from collections.abc import Iterator

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.family.parts import LayerParts
from jcrosslora.relation.expert_matching import match_experts, same_form
from jcrosslora.relation.matching import MIN_MEAN_COSINE
from jcrosslora.relation.structure import LayerMap
from jcrosslora.relation.weight_similarity import cosine_similarity, evenly_spaced, module_rows

_ROWS = 16  # of each module that is looked at


def has_other_parts(base: BaseModel) -> bool:
    """Whether a base has layers of other parts than attention and a dense MLP."""
    return set(base.parts) != {LayerParts()}


def same_parts(source: BaseModel, target: BaseModel) -> bool:
    """Whether two bases have modules of the same roles and shapes and experts of the same form, in any layers."""
    shapes = [{module.role: module.shape for module in base.modules.values()} for base in (source, target)]
    return shapes[0] == shapes[1] and same_form(source, target)


def matched_layers(source: BaseModel, target: BaseModel) -> tuple[LayerMap | None, ...]:
    """Return the map of every layer, None for a layer that resembles none of the source with the same parts.

    The layer of the same number is preferred.

    Args:
        source: the base that adapters come from.
        target: the base that they go to, with `same_parts`.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    samples: dict[int, dict[str, np.ndarray]] = {}
    found: list[LayerMap | None] = []
    for layer in range(target.dims.layers):
        rows = dict(_rows(target, layer))
        candidates = [other for other, parts in enumerate(source.parts) if parts == target.parts[layer]]
        candidates.sort(key=lambda other, layer=layer: other != layer)
        best, most = None, MIN_MEAN_COSINE
        for other in candidates:
            if other not in samples:
                samples[other] = dict(_rows(source, other))
                source.release()
            cosine = float(np.mean([cosine_similarity(samples[other][role], rows[role]) for role in rows]))
            if cosine >= most:
                best, most = other, cosine
                if other == layer:
                    break
        found.append(None if best is None else _map(source, target, best, layer))
        target.release()
    return tuple(found)


def _map(source: BaseModel, target: BaseModel, layer_src: int, layer_tgt: int) -> LayerMap:
    dims = target.dims
    shapes = {module.role: module.shape for module in target.modules.values() if module.layer == layer_tgt}
    attends, dense = "o_proj" in shapes, "down_proj" in shapes
    queries = np.arange(dims.heads * dims.head_dim if attends else 0)
    keys = np.arange(dims.kv_heads * dims.head_dim if attends else 0)
    neurons = np.arange(dims.intermediate if dense else 0)
    has_experts = layer_tgt in target.layers_with("router")
    experts = match_experts(source, target, layer_src, layer_tgt) if has_experts else None
    return LayerMap(layer_src, queries, keys, keys, queries, neurons, experts, shapes)


def _rows(base: BaseModel, layer: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the role of each module of a layer, and a few of its rows."""
    for name, module in base.modules.items():
        if module.layer == layer:
            yield module.role, module_rows(base, name, evenly_spaced(module.shape[0], _ROWS))
