"""Match the experts of two layers by the rows of their routers, and check the match by their weights."""

import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.relation.matching import MIN_MEAN_COSINE, match_columns
from jcrosslora.relation.weight_similarity import check_finite, cosine_similarity, evenly_spaced

MATRICES = ("gate_up", "down")
_CHECKED, _ROWS = 4, 8  # experts whose weights are looked at, and rows of each matrix


def same_form(source: BaseModel, target: BaseModel) -> bool:
    """Whether neither of two bases has experts, or both have some of the same shape that are stored alike."""
    forms = []
    for base in (source, target):
        if not base.layers_with("router"):
            forms.append(None)
            continue
        forms.append([(base.expert_shape(matrix)[1:], base.expert_axis(matrix)) for matrix in MATRICES])
    return forms[0] == forms[1]


def match_experts(source: BaseModel, target: BaseModel, layer_src: int, layer_tgt: int) -> np.ndarray:
    """Find the source expert of every target expert of a layer.

    Args:
        source: the base that adapters come from.
        target: the base that they go to, with `same_form`.
        layer_src: of the source.
        layer_tgt: of the target.

    Returns:
        int64 (E_tgt,), -1 for an expert without a counterpart.

    Raises:
        CheckpointError: a sampled weight cannot be read, or holds NaN or infinity.
    """
    routers = [_router(base, layer) for base, layer in ((source, layer_src), (target, layer_tgt))]
    found = match_columns(*(router.T for router in routers))
    if found is None:  # other routers, perhaps of the same experts
        found = np.arange(len(routers[1])) if len(routers[0]) == len(routers[1]) else np.full(len(routers[1]), -1)
    matched = np.flatnonzero(found >= 0)
    some = matched[evenly_spaced(len(matched), _CHECKED)] if len(matched) else matched
    cosines = [
        cosine_similarity(
            expert_rows(source, layer_src, matrix, int(found[expert]), _ROWS),
            expert_rows(target, layer_tgt, matrix, int(expert), _ROWS),
        )
        for expert in some
        for matrix in MATRICES
    ]
    return found if cosines and np.mean(cosines) >= MIN_MEAN_COSINE else np.full(len(found), -1)


def expert_rows(base: BaseModel, layer: int, matrix: str, expert: int, count: int) -> np.ndarray:
    """Read at most `count` evenly spaced rows of a matrix of one expert, as it is stored: float32 (n, columns).

    Raises:
        CheckpointError: a row holds NaN or infinity.
    """
    rows = evenly_spaced(base.expert_shape(matrix)[base.expert_axis(matrix)], count)
    name = f"expert {expert} of layer {layer}"
    return check_finite(base, name, base.expert_rows(layer, matrix, expert, rows))


def _router(base: BaseModel, layer: int) -> np.ndarray:
    router = base.expert_tensor(layer, "router").astype(np.float32)
    return check_finite(base, f"the router of layer {layer}", router)
