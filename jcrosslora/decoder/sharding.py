"""The weights of a base on devices: their sizes, and which axis of each matrix is divided.

Modules that write to the residual stream are row-parallel, all others column-parallel, as in Megatron-LM (arXiv
1909.08053): a column-parallel product needs no exchange, and the row-parallel one behind it a sum over the devices. An
expert is divided like an MLP and not kept whole on one device, since the layers run one expert after the other. Norms,
biases, routers and the small tensors of mixers are whole on each device.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jcrosslora.architectures.blocks import ROLES, WRITERS
from jcrosslora.checkpoint import BaseModel

_EXPERTS = ("gate_up", "down")  # matrices of experts
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


def stack_shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of matrices in `Params`, by the names of `divided_axis`.

    Returns:
        Role -> (L, O, I) of the L layers that have it; "gate_up" and "down" of experts -> (L, E, O, I); "embedding",
        "head" of a model that is not tied, and "layer_embedding" -> (V, columns).
    """
    dims, family, experts = base.dims, base.family, len(base.layers_with("router"))
    found: dict[str, tuple[int, ...]] = {"embedding": (dims.vocab, dims.hidden)}
    if not base.tied:
        found["head"] = (dims.vocab, dims.hidden)
    if features := base.architecture.layer_inputs:
        found["layer_embedding"] = (dims.vocab, dims.layers * features)
    for role, shape in base.architecture.role_shapes.items():
        found[role] = (len(base.layers_with(role)), *shape)
    if family.experts is not None and experts:
        found |= {name: (experts, *base.expert_shape(name)) for name in _EXPERTS}
    return found


def held_numbers(base: BaseModel, devices: int = 1) -> int:
    """Count the numbers of a base's weights on each of the devices that they are divided over."""
    shapes = stack_shapes(base)
    small = sum(map(prod, base.tensor_shapes().values())) - sum(map(prod, shapes.values()))
    parts = (
        prod(shape) // (1 if divided_axis(name, shape, devices) is None else devices) for name, shape in shapes.items()
    )
    return small + sum(parts)


def fill(
    shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray], sharding: NamedSharding | None = None
) -> jax.Array:
    """Return an array of pieces, of which the host holds one at a time and a device what is its own.

    The pieces are rows (n, ...) of the array, in order. Without a sharding all of it is on the default device.
    """
    places: Mapping[Any, Any] = {None: (slice(None),) * len(shape)}
    if sharding is not None:
        places = sharding.addressable_devices_indices_map(shape)
    # Written to the device at once: a host array of the whole would double the memory on a CPU.
    parts = {device: jnp.zeros(_size(shape, index), dtype, device=device) for device, index in places.items()}
    start = 0
    for piece in pieces:
        for device, index in places.items():
            first, last, _ = index[0].indices(shape[0])
            low, high = max(first, start), min(last, start + len(piece))
            if low < high:
                own = piece[(slice(low - start, high - start), *index[1:])]
                parts[device] = _write(parts[device], own, np.int32(low - first))
        start += len(piece)
    if sharding is None:
        return parts[None]
    return jax.make_array_from_single_device_arrays(shape, sharding, list(parts.values()))


def _size(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(size))) for size, part in zip(shape, index, strict=True))


@partial(jax.jit, donate_argnums=0)
def _write(whole: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, piece, start, 0)
