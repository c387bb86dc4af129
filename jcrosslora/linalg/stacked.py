"""Run unbatched maths over a stack of matrices, on one device or divided over several."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "layers"


def spread(stack: np.ndarray) -> jax.Array:
    """Put an array on the local devices, divided along its first axis, which their number has to divide."""
    devices = np.array(jax.local_devices())
    if devices.size == 1:
        return jax.device_put(stack)
    return jax.device_put(stack, NamedSharding(Mesh(devices, (AXIS,)), PartitionSpec(AXIS)))


def place(array: np.ndarray) -> jax.Array:
    """Put an array on the local devices, divided as `spread` does it if their number divides it, else on the first."""
    return spread(array) if len(array) % jax.local_device_count() == 0 else jax.device_put(array)


def over_all_devices() -> NamedSharding:
    """The first axis divided over the devices of all processes, those of each process side by side."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))


def mesh_of(stack: jax.Array) -> Mesh | None:
    """The mesh that a stack made by `spread` is divided over, None on one device."""
    sharding = stack.sharding
    divided = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and sharding.spec[:1] == (AXIS,)
    return sharding.mesh if divided else None  # type: ignore[return-value]


def over_layers(function: Callable[..., Any], mesh: Mesh | None, stacked: Any, shared: Any = None) -> Any:
    """Apply `function(item, shared)` to every item of a stack; to be called under jit.

    Each device works through its own part with no exchange between them. On an accelerator the items of a part are
    batched with vmap. On a CPU they are taken one after the other: LAPACK does so in any case, and its batched call
    waits for threads that the other devices' calls hold, for ever where there are not more threads than devices.

    Args:
        function: maths of one item.
        mesh: from `mesh_of`.
        stacked: a pytree whose arrays have the leading axis L.
        shared: a pytree that is the same for all items.
    """

    def part(stacked: Any, shared: Any) -> Any:
        if jax.default_backend() == "cpu":
            return lax.map(lambda item: function(item, shared), stacked)
        return jax.vmap(function, in_axes=(0, None))(stacked, shared)

    if mesh is None:
        return part(stacked, shared)
    specs = (PartitionSpec(AXIS), PartitionSpec())
    # Unchecked: loops of unbatched maths begin with constants, which are not marked as different on every device.
    divided = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
    return divided(stacked, shared)
