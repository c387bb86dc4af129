"""Scan the layers of a model: divide them into segments with a repeating pattern of layers, and slice the arrays."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.architecture import Layer
from jcrosslora.architectures.ops import Row, on_host
from jcrosslora.architectures.run import NO_WINDOW, LayerWeights
from jcrosslora.architectures.settings import DecoderSettings
from jcrosslora.decoder.model import AppliedAdapter, Params

T = TypeVar("T")
_MATRICES = 3  # axes of a stack of matrices; stacks with more hold a list of matrices, of experts, in each layer


def layer_at(settings: DecoderSettings, params: Params, adapter: AppliedAdapter | None, layer: int) -> LayerWeights:
    """Return the arrays of one layer."""
    taken = _take(settings, params, adapter, range(layer, layer + 1))
    return taken.of(jax.tree.map(lambda x: x[0], taken.slices), jax.tree.map(lambda x: x[0], taken.indices))


def scan_layers(
    settings: DecoderSettings,
    params: Params,
    adapter: AppliedAdapter | None,
    step: Callable[[T, LayerWeights], tuple[T, Any]],
    carry: T,
) -> tuple[T, Any]:
    """Run a step on the layers one after another.

    The step takes a carry and the arrays of a layer, and returns the next carry and a tree of arrays.

    Returns:
        The last carry, and the trees of all layers stacked. A dictionary entry has only the layers that returned it.
    """
    kept = []
    for segment in segments_of(settings.stack):
        layers = [segment.layers(place) for place in range(len(segment.pattern))]
        taken = [_take(settings, params, adapter, each) for each in layers]

        def body(carry: T, xs: list[Any], taken: list[_Taken] = taken) -> tuple[T, list[Any]]:
            found = []
            for own, (slices, indices) in zip(taken, xs, strict=True):
                carry, one = step(carry, own.of(slices, indices))
                found.append(one)
            return carry, found

        carry, found = lax.scan(body, carry, [(own.slices, own.indices) for own in taken])
        kept += zip(layers, found, strict=True)
    return carry, join_layers(kept)


@flax.struct.dataclass
class _Taken:
    """The arrays of N layers of the same kind.

    Attributes:
        slices: with a first axis of N.
        stacks: arrays that are not sliced, by field and name.
        indices: int32 (N,) each, the layers' indices in these stacks.
    """

    slices: LayerWeights
    stacks: dict[str, dict[str, jax.Array]]
    indices: dict[str, dict[str, jax.Array]]

    def of(self, slices: LayerWeights, indices: dict[str, dict[str, jax.Array]]) -> LayerWeights:
        """Return one layer, from its slices and indices."""
        rows = {
            field: {name: Row(stack, indices[field][name]) for name, stack in stacks.items()}
            for field, stacks in self.stacks.items()
        }
        return dataclasses.replace(slices, **{field: {**getattr(slices, field), **own} for field, own in rows.items()})


def _take(settings: DecoderSettings, params: Params, adapter: AppliedAdapter | None, layers: range) -> _Taken:
    """Take evenly spaced layers of the same kind out of the stacks of a model."""
    own = settings.stack[layers[0]]
    windows = [NO_WINDOW if window is None else window for window in settings.windows]

    def sliced(stacks: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: _places(settings, name, layers) for name in stacks}
        return {
            name: jax.tree.map(lambda x, at=at: _slice(x, at), stacks[name]) for name, at in found.items() if len(at)
        }

    whole, stacks, indices = {}, {}, {}
    for field, named in {"weights": params.weights, "tensors": params.tensors}.items():
        whole[field], stacks[field], indices[field] = {}, {}, {}
        for name, stack in named.items():
            at = _places(settings, name, layers)
            few = stack.ndim < _MATRICES or (len(at) == len(stack) and stack.ndim == _MATRICES)
            if len(at) and (on_host(stack) or not few):
                stacks[field][name] = stack
                indices[field][name] = jnp.asarray(at, jnp.int32)
            elif len(at):
                whole[field][name] = _slice(stack, at)
    held = {kind: [number for number, one in enumerate(settings.stack) if kind in one.kinds] for kind in own.kinds}
    slices = LayerWeights(
        layer=_numbers(layers),
        places={kind: _numbers([same.index(layer) for layer in layers]) for kind, same in held.items()},
        weights=whole["weights"],
        biases=sliced(params.biases),
        norms=sliced(params.norms),
        norm_biases=sliced(params.norm_biases),
        activation=tuple(_slice(x, layers) for x in params.activation),
        factors={} if adapter is None else sliced(adapter.roles),
        window=_numbers([windows[layer] for layer in layers]),
        rope=_numbers([settings.layer_ropes[layer] for layer in layers]),
        tensors=whole["tensors"],
        own=own,
        ropes=settings.ropes_of(own.mixer),
    )
    return _Taken(slices, stacks, indices)


def _numbers(values: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


def _places(settings: DecoderSettings, name: str, layers: range) -> range:
    """Return the indices of layers among the layers with an array of this name; empty if they do not have it."""
    held = settings.layers_with(name)
    if layers[0] not in held:
        return range(0)
    first = held.index(layers[0])
    step = held.index(layers[1]) - first if len(layers) > 1 else 1
    return range(first, first + step * len(layers), step)


def _slice(stack: jax.Array, at: range) -> jax.Array:
    return stack if len(at) == len(stack) else stack[at.start : at.stop : at.step]


@dataclass(frozen=True)
class Segment:
    """A part of the layers."""

    start: int  # index of the first layer
    pattern: tuple[Layer, ...]
    repeats: int  # of the pattern

    def layers(self, place: int) -> range:
        """Return the layers at one place of the pattern."""
        return range(self.start + place, self.start + len(self.pattern) * self.repeats, len(self.pattern))


@cache
def segments_of(stack: tuple[Layer, ...]) -> tuple[Segment, ...]:
    """Divide layers into few segments: each is the repeated pattern that covers most layers, or a single layer."""
    found, start = [], 0
    while start < len(stack):
        rest = stack[start:]
        # `max` takes the shortest pattern in a tie.
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

    Dictionaries may have different keys: an array of the result has the layers in which its key occurs.
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
