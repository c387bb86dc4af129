"""Stacks of weights of equal shape, in groups of bounded size, on the devices."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.base import damaged
from jcrosslora.linalg import shard

# Bytes of both bases' weights in a group, as float32. The next group is read while one is aligned, so a model of any
# size needs the memory of two groups.
GROUP_BYTES = 96 * 2**20
T = TypeVar("T")


def bounded_groups(items: Sequence[T], key: Callable[[T], Hashable], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items with equal keys in groups of nearly equal length, at most `GROUP_BYTES` each.

    Items with equal keys can be stacked and have the same size in bytes.
    """
    alike: dict[Hashable, list[T]] = {}
    for item in items:
        alike.setdefault(key(item), []).append(item)
    for same in alike.values():
        most = max(jax.device_count(), GROUP_BYTES // size(same[0]))  # a device without an item would repeat another's
        for part in np.array_split(np.arange(len(same)), -(-len(same) // most)):
            yield [same[to_device] for to_device in part]


def load_on_host(base: BaseModel, names: Sequence[str]) -> np.ndarray:
    """Load the weights of (possibly fused) modules of one shape, (L, O, I) float32; raise as `load_stack`."""
    first = base.stored_weight(names[0])
    stack = np.empty((len(names), *first.shape), np.float32)
    for to_device, name in enumerate(names):  # one by one, so that they are read into the same memory
        stack[to_device] = base.stored_weight(name) if to_device else first
    base.release()
    _check_finite(base, names, [np.isfinite(weight).all() for weight in stack])
    return stack


def load_stack(base: BaseModel, names: Sequence[str]) -> jax.Array:
    """Load the weights of (possibly fused) modules of one shape, (L', O, I) float32, over all local devices.

    L' is len(names) rounded up to a multiple of the device count; the surplus repeats the last module. Weights go to
    the device in their stored dtype and are widened there, unless modules differ in dtype. Raises CheckpointError if a
    weight holds NaN or infinity.
    """
    weights = [base.stored_weight(name) for name in names]
    if len({weight.dtype for weight in weights}) > 1:  # numpy has no dtype that holds both float16 and bfloat16
        weights = [weight.astype(np.float32) for weight in weights]
    surplus = -len(names) % jax.local_device_count()
    stored = np.stack(weights + weights[-1:] * surplus)
    if jax.default_backend() == "cpu":  # the device is the host, so widen without compiling
        stored = stored.astype(np.float32, copy=False)
        stack, finite = shard(stored), [np.isfinite(weight).all() for weight in stored]
    else:
        stack, finite = _widen(shard(stored))
    base.release()
    _check_finite(base, names, np.asarray(finite))
    return stack


def _check_finite(base: BaseModel, names: Sequence[str], finite: ArrayLike) -> None:
    if not np.all(finite):
        raise damaged(base, names[min(int(np.argmin(finite)), len(names) - 1)])


@jax.jit
def _widen(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convert (L, O, I) to float32, and return whether each matrix is finite, (L,)."""
    stack = stack.astype(jnp.float32)
    return stack, jnp.isfinite(stack).all(axis=(1, 2))
