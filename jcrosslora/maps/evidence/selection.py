"""Select the rows and columns of the source that each target module consists of."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.maps.evidence.records import Evidence, Selection
from jcrosslora.maps.evidence.request import EvidenceRequest, ModuleStack
from jcrosslora.relation import Structure
from jcrosslora.relation.pairing import Depth
from jcrosslora.utils.cost import Cost

_DEFAULT_DEPTH = "proportional"


class SelectionProvider:
    """Adds the rows and columns of the source that a target module consists of."""

    is_costly = False
    reads_tokenizers = False

    def check(self, request: EvidenceRequest) -> None:
        """Accept every request: `selected_layers` refuses bases without shared structure when layers are paired."""

    def cost(self, request: EvidenceRequest, texts: int) -> Cost:
        """Count nothing."""
        del request, texts
        return Cost()

    def cache_key(self, request: EvidenceRequest) -> Any:
        """Return None: the selection depends on the weights alone."""

    def collect(self, request: EvidenceRequest) -> Any:
        """Read the structure that the two bases share."""
        structure, target = request.pair.structure[0], request.pair.target
        assert structure is not None

        def add(evidence: Evidence, stack: ModuleStack) -> Evidence:
            return dataclasses.replace(evidence, selection=_select_rows(structure, target, stack))

        return add


def selected_layers(found: tuple[Structure | None, str], depth: Depth) -> tuple[int | None, ...]:
    """Return the source layer of every target layer from the structure that two bases share.

    Args:
        found: the result of `find_structure`.
        depth: the requested depth map: the default, or the one that the structure gives.

    Raises:
        MethodError: neither base consists of parts of the other.
        UsageError: another depth map was requested.
    """
    structure, reason = found
    if structure is None:
        msg = f"method select needs a base that is made of the other's parts: {reason}; use another method"
        raise MethodError(msg)
    layers = tuple(None if layer is None else layer.layer for layer in structure.layers)
    if depth != _DEFAULT_DEPTH and (isinstance(depth, str) or tuple(depth) != layers):
        shown = ",".join("-" if layer is None else str(layer) for layer in layers)
        msg = f"method select finds the layers by their weights, here {shown}; leave the depth map out"
        raise UsageError(msg)
    return layers


def _select_rows(structure: Structure, target: BaseModel, stack: ModuleStack) -> Selection:
    """Return the rows and columns of the modules of a stack, all in layers that have a counterpart."""
    modules = [target.modules[pair.target] for pair in stack.pairs]
    outputs = [structure.outputs(module.layer, module.role) for module in modules]
    inputs = [structure.inputs(module.layer, module.role) for module in modules]

    def stacked(rows: list[np.ndarray | None]) -> np.ndarray:
        found = [row for row in rows if row is not None]
        assert len(found) == len(modules)
        return np.stack(stack.filled(found)).astype(np.int32)

    return Selection(jnp.asarray(stacked(outputs)), jnp.asarray(stacked(inputs)))
