"""Which axis of each matrix of a base is divided over devices.

Modules that write to the residual stream are row-parallel, all others column-parallel, as in Megatron-LM (arXiv
1909.08053): a column-parallel product needs no exchange, and the row-parallel one behind it a sum over the devices. An
expert is divided like an MLP and not kept whole on one device, since the layers run one expert after the other. Norms,
biases, routers and the small tensors of mixers are whole on each device.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jcrosslora.checkpoint.family.names import ROLES, WRITERS

AXIS = "model"  # of the mesh
# Axes (O, I) or (V, H) counted from the end, by name: the one to divide, and the one where that cannot be divided.
_ROWS, _COLUMNS = (-2, -1), (-1, -2)
_AXES = {
    **dict.fromkeys(("embedding", "head", "layer_embedding", "gate_up"), _ROWS),
    "down": _COLUMNS,
    **{role: _COLUMNS if role in WRITERS else _ROWS for role in ROLES},
}


def mesh_of(devices: int) -> Mesh:
    """Return the mesh, of one axis, of so many devices of this process."""
    return Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))


def divided_axis(name: str, shape: Sequence[int], devices: int) -> int | None:
    """Return the axis of a weight that is divided over devices, None where each has all of it.

    Args:
        name: a role; "gate_up" or "down" of experts; "embedding", "head", or "layer_embedding", the embedding of the
            layers' own inputs. What has another name is whole.
        shape: of the stack (L, O, I) of a role, (L, E, O, I) of experts, or (V, H) of an embedding.
        devices: their number.
    """
    axes = [] if devices == 1 else [axis for axis in _AXES.get(name, ()) if shape[axis] % devices == 0]
    return len(shape) + axes[0] if axes else None


def weight_sharding(mesh: Mesh | AbstractMesh, name: str, shape: Sequence[int]) -> NamedSharding:
    """Return how a weight lies on the devices of a mesh; for the arguments see `divided_axis`."""
    axis = divided_axis(name, shape, mesh.size)
    return NamedSharding(mesh, PartitionSpec(*() if axis is None else (*(None,) * axis, AXIS)))


def whole(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of arrays that each device of a mesh has all of."""
    return NamedSharding(mesh, PartitionSpec())
