"""Which rows and columns of the source each target module takes, for the method `select`."""

from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np

from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.evidence.records import Selection
from jcrosslora.lineage import Structure, find_structure
from jcrosslora.lineage.pairing import Depth

_DEFAULT_DEPTH = "proportional"


def find_selection(
    source: BaseModel, target: BaseModel, depth: Depth, found: tuple[Structure | None, str] | None = None
) -> tuple[Structure, tuple[int | None, ...]]:
    """The structure that two bases share, and the source layer of every target layer.

    Args:
        source: the base that adapters come from.
        target: the base that they go to.
        depth: the map of layers that was asked for: the default, or what is found anyway.
        found: what `find_structure` found, if it has been asked.

    Raises:
        MethodError: the target is not made of parts of the source, nor the source of the target's.
        UsageError: another map of layers was asked for.
        CheckpointError: a weight cannot be read, or holds NaN or infinity.
    """
    structure, reason = found or find_structure(source, target)
    if structure is None:
        msg = f"method select needs a base that is made of the other's parts: {reason}; use another method"
        raise MethodError(msg)
    layers = tuple(None if layer is None else layer.layer for layer in structure.layers)
    if depth != _DEFAULT_DEPTH and (isinstance(depth, str) or tuple(depth) != layers):
        shown = ",".join("-" if layer is None else str(layer) for layer in layers)
        msg = f"method select finds the layers by their weights, here {shown}; leave the depth map out"
        raise UsageError(msg)
    return structure, layers


def select_rows(structure: Structure, target: BaseModel, names: Iterable[str], count: int) -> Selection:
    """The rows and columns of some target modules of one shape.

    Args:
        structure: of the pair of bases.
        target: the target base.
        names: its modules, all of layers that have a counterpart.
        count: length of the leading axis; the last module is repeated to fill it.

    Returns:
        The selection with a leading axis.
    """
    modules = [target.modules[name] for name in names]
    outputs = [structure.outputs(module.layer, module.role) for module in modules]
    inputs = [structure.inputs(module.layer, module.role) for module in modules]

    def stack(rows: list[np.ndarray | None]) -> np.ndarray:
        found = [row for row in rows if row is not None]
        assert len(found) == len(modules)
        return np.stack(found + found[-1:] * (count - len(found))).astype(np.int32)

    return Selection(jnp.asarray(stack(outputs)), jnp.asarray(stack(inputs)))
