"""Apply a function of one matrix to a stack of matrices, on one device or sharded over several."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "layers"


def spread(stack: np.ndarray) -> jax.Array:
    """Put an array on the local devices, sharded along its first axis, whose length their number must divide."""
    devices = np.array(jax.local_devices())
    if devices.size == 1:
        return jax.device_put(stack)
    return jax.device_put(stack, NamedSharding(Mesh(devices, (AXIS,)), PartitionSpec(AXIS)))


def place(array: np.ndarray) -> jax.Array:
    """Shard an array over the local devices if their number divides its length, else put it on the first."""
    return spread(array) if len(array) % jax.local_device_count() == 0 else jax.device_put(array)


def over_all_devices() -> NamedSharding:
    """Return the sharding of a first axis over the devices of all processes, grouped by process."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def mesh_of(stack: jax.Array) -> Mesh | None:
    """Return the mesh of a stack that `spread` has sharded, None on one device."""
    sharding = stack.sharding
    divided = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and sharding.spec[:1] == (AXIS,)
    return sharding.mesh if divided else None  # type: ignore[return-value]


def over_layers(function: Callable[..., Any], mesh: Mesh | None, stacked: Any, shared: Any = None) -> Any:
    """Apply `function(item, shared)` to every item of a stack; call it under jit.

    Devices work on their own items without communication. An accelerator batches its items with vmap. A CPU takes them
    one by one: LAPACK does so in any case, and its batched call waits for threads that the calls of other devices hold,
    a deadlock if there are no more threads than devices.

    Args:
        function: of one item.
        mesh: from `mesh_of`.
        stacked: a pytree whose arrays have the leading axis L.
        shared: a pytree, the same for all items.
    """

    def part(stacked: Any, shared: Any) -> Any:
        if jax.default_backend() == "cpu":
            return lax.map(lambda item: function(item, shared), stacked)
        return jax.vmap(function, in_axes=(0, None))(stacked, shared)

    if mesh is None:
        return part(stacked, shared)
    specs = (PartitionSpec(AXIS), PartitionSpec())
    # check_vma is off because loops in `function` start from constants, which are not marked as varying by device.
    divided = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
    return divided(stacked, shared)
