"""Carry updates of experts to the experts of a target that is a copy of the source, or of parts of it."""

import numpy as np

from jcrosslora.adapter import Adapter
from jcrosslora.adapter.expert_updates import ExpertUpdate
from jcrosslora.adapter.experts import expert_update
from jcrosslora.adapter.ignored import describe_experts
from jcrosslora.checkpoint import BaseModel
from jcrosslora.maps.evidence.base_pair import BasePair
from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.method import Method
from jcrosslora.relation.structure import LayerMap


def carry_experts(adapter: Adapter, pair: BasePair, method: Method) -> tuple[tuple[ExpertUpdate, ...], tuple[str, ...]]:
    """Give each expert of the target the update of the source expert that it corresponds to, exactly.

    Args:
        adapter: of the source, with updates of experts.
        pair: both bases.
        method: one that selects layers takes them from other places; others only from the layer of the same number.

    Returns:
        The updates of the target, and what the user has to know, one sentence each.
    """
    structure, reason = pair.structure
    selects = EvidenceKind.SELECTION in method.requires
    found: list[ExpertUpdate] = []
    used: set[str] = set()
    for number, layer in enumerate(() if structure is None else structure.layers):
        if layer is None or layer.experts is None or not (layer.experts >= 0).any():
            continue
        if selects or layer.layer == number:
            own = [update for update in adapter.experts if update.layer == layer.layer]
            found += [_carried(update, layer, pair.target, number) for update in own]
            used |= {update.name for update in own}
    left = [update for update in adapter.experts if update.name not in used]
    notes = [f"moved too: {describe_experts(adapter.experts)}, to the same experts of the target."] if found else []
    if left:
        why = reason or "the target has no counterpart of these experts"
        notes.append(f"not moved: {describe_experts(left)}: {why}.")
    return tuple(found), tuple(notes)


def _carried(update: ExpertUpdate, layer: LayerMap, target: BaseModel, number: int) -> ExpertUpdate:
    assert layer.experts is not None
    kept, places = (layer.experts >= 0)[:, None, None], np.maximum(layer.experts, 0)
    a, b = (np.where(kept, each[places], np.float32(0)) for each in (update.a, update.b))
    return expert_update(target, number, update.matrix, a, b, update.share)
