"""Write an array to its devices piece by piece, each device its own part."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding


def fill(
    shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray], sharding: NamedSharding | None = None
) -> jax.Array:
    """Return an array of pieces, of which the host holds one at a time and a device what is its own.

    Args:
        shape: of the array.
        dtype: of the array and of the pieces.
        pieces: its rows (n, ...), in order.
        sharding: which device has which part; None puts all on the default device.
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
