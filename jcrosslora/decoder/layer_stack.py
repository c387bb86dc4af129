"""The arrays of the layers as a scan takes them, from the stacks of a model, which hold just the layers with them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.architectures.attention import NO_WINDOW
from jcrosslora.architectures.ops import Row
from jcrosslora.architectures.run import LayerWeights
from jcrosslora.architectures.settings import DecoderSettings
from jcrosslora.decoder.adapters import AppliedAdapter
from jcrosslora.decoder.model import Params
from jcrosslora.decoder.segments import join_layers, segments_of

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

    Args:
        settings: of the model.
        params: its weights.
        adapter: or None.
        step: of a carry and the arrays of a layer: the next carry, and a tree of arrays.
        carry: the first.

    Returns:
        The last carry, and the trees of all layers stacked. In dictionaries of them an array has just the layers that
        returned its key.
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
    """The arrays of N layers that are equal.

    Attributes:
        slices: with a first axis of N.
        stacks: arrays that are not sliced, by field and name.
        indices: int32 (N,) each, where in these stacks the layers are.
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
    """Take layers that are equal, equally far from each other, out of the stacks of a model."""
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
            if (len(at) == len(stack) and stack.ndim <= _MATRICES) or (len(at) and stack.ndim < _MATRICES):
                whole[field][name] = _slice(stack, at)
            elif len(at):
                stacks[field][name] = stack
                indices[field][name] = jnp.asarray(at, jnp.int32)
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
    """Return where layers are among those that have an array of a name; nowhere if they do not have it."""
    held = settings.layers_with(name)
    if layers[0] not in held:
        return range(0)
    first = held.index(layers[0])
    step = held.index(layers[1]) - first if len(layers) > 1 else 1
    return range(first, first + step * len(layers), step)


def _slice(stack: jax.Array, at: range) -> jax.Array:
    return stack if len(at) == len(stack) else stack[at.start : at.stop : at.step]
