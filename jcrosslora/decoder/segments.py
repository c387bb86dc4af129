"""Divide the layers of a model into segments, each a pattern of layers that repeats, so that each can be scanned."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.layer import Layer


@dataclass(frozen=True)
class Segment:
    """A part of the layers.

    Attributes:
        start: its first layer.
        pattern: its first P layers.
        repeats: how often the pattern follows on itself.
    """

    start: int
    pattern: tuple[Layer, ...]
    repeats: int

    def layers(self, place: int) -> range:
        """Return the layers at one place of the pattern."""
        return range(self.start + place, self.start + len(self.pattern) * self.repeats, len(self.pattern))


@cache
def segments_of(stack: tuple[Layer, ...]) -> tuple[Segment, ...]:
    """Divide layers into few segments: each takes the repeated pattern that covers most, or else a single layer."""
    found, start = [], 0
    while start < len(stack):
        rest = stack[start:]
        # The first of equally long ones has the shortest pattern.
        size = max(range(1, len(rest) // 2 + 1), key=lambda size: _covered(rest, size), default=1)
        covered = max(_covered(rest, size), 1)
        found.append(Segment(start, rest[: size if covered > 1 else 1], covered // size if covered > 1 else 1))
        start += covered
    return tuple(found)


def _covered(parts: Sequence[Layer], size: int) -> int:
    """Count the layers that repeat the first `size`, 0 if these are not repeated."""
    repeats = 1
    while parts[repeats * size : (repeats + 1) * size] == parts[:size]:
        repeats += 1
    return size * repeats if repeats > 1 else 0


def join_layers(parts: Sequence[tuple[Sequence[int], Any]]) -> Any:
    """Join trees of arrays with a first axis of layers into one, in the order of the layers.

    Args:
        parts: layers, and a tree of their arrays. Dictionaries need not have the same keys: an array of the result has
            those layers in which its key occurs.
    """
    first = parts[0][1]
    if len(parts) == 1:
        return first
    if isinstance(first, dict):
        keys = dict.fromkeys(key for _, tree in parts for key in tree)
        return {key: join_layers([(layers, tree[key]) for layers, tree in parts if key in tree]) for key in keys}
    if isinstance(first, tuple) and type(first) is tuple:
        return tuple(join_layers([(layers, tree[place]) for layers, tree in parts]) for place in range(len(first)))
    order = np.argsort(np.concatenate([np.asarray(layers) for layers, _ in parts]))

    def join(*arrays: jax.Array) -> jax.Array:
        joined = jnp.concatenate(arrays)
        return joined if (np.diff(order) == 1).all() else joined[order]

    return jax.tree.map(join, *(tree for _, tree in parts))
