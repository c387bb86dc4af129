"""The inputs of a block: arrays of its layer, arrays shared by all layers, and the cache."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jcrosslora.architectures.config import Dims
from jcrosslora.architectures.ops import ACTIVATIONS, Row, from_bits, is_packed, layer_norm, linear, rms_norm
from jcrosslora.architectures.ropes import Rope

# Checkpoint name of the outputs of linear modules, which are kept for the backward pass. On a CPU, recomputing what
# lies between them is faster than writing it to memory and reading it.
MODULE_OUTPUT = "module output"
NO_WINDOW = 1 << 30  # window size of a layer with full attention


@dataclass(frozen=True)
class BlockSettings(Dims):
    """Sizes of a model and settings shared by all its blocks; hashable, and static under jit.

    Attributes:
        eps: added to the mean square in every norm.
        layer_norm: whether norms subtract the mean first.
        activation: a name of `ops.ACTIVATIONS`.
        attn_scale: factor on the attention scores.
        attn_soft_cap: soft cap of the attention scores, or None.
        residual_scale: factor on what attention and MLP add to the residual stream.
        parallel: whether attention and MLP read the same normed input.
        interleaved: whether neighbouring features are rotated together.
        chunked_windows: whether a window is a chunk of positions, instead of the last ones.
        input_factors: (role, factor on a module's input), where it is not 1.
        output_factors: (role, factor on a module's output), where it is not 1.
    """

    eps: float
    layer_norm: bool
    activation: str
    attn_scale: float
    attn_soft_cap: float | None
    residual_scale: float
    parallel: bool
    interleaved: bool
    chunked_windows: bool
    input_factors: tuple[tuple[str, float], ...]
    output_factors: tuple[tuple[str, float], ...]
    ropes: tuple[Rope, ...]


class Update(Protocol):
    """An adapter's update of the modules of one role in a layer."""

    def apply(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Return a module's output with the update, float32 (..., O), given its input (..., I) and output without."""
        ...


@flax.struct.dataclass
class LayerCapture:
    """The inputs and outputs of one layer; under jit, unused ones are not computed.

    Attributes:
        layer: int32 scalar, index of the layer.
        inputs: site -> (B, T, I): "attn_in" of q, k and v, "attn_out_in" of o, "mlp_in" of gate and up, "down_in" of
            down (see `Linear.site`).
        outputs: role -> (B, T, O), the module's output with bias and adapter, before any norm or rotary position.
        residual: (B, T, H), the residual stream after the layer.
    """

    layer: jax.Array
    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    residual: jax.Array


@flax.struct.dataclass
class LayerWeights:
    """The arrays of one layer: its slices of `Params` and of an applied adapter.

    Attributes:
        layer: int32 scalar, index of the layer.
        places: kind of a state -> int32 scalar, index of the layer's state in a cache.
        weights: role -> (O, I); biases are role -> (O,).
        norms: name -> gain.
        norm_biases: name -> bias.
        activation: trained parameters of the activation.
        factors: role -> update by an adapter; empty without one.
        window: int32 scalar, number of visible positions.
        rope: int32 scalar, index of the rotary setting.
        tensors: name -> tensor, see `Block.tensors`; those of experts are a `Row`.
        own: static, its `Layer`.
        ropes: static, the rotary settings of all layers with the same mixer.
    """

    layer: jax.Array
    places: dict[str, jax.Array]
    weights: dict[str, jax.Array | Row]
    biases: dict[str, jax.Array]
    norms: dict[str, jax.Array]
    norm_biases: dict[str, jax.Array]
    activation: tuple[jax.Array, ...]
    factors: dict[str, Update]
    window: jax.Array
    rope: jax.Array
    tensors: dict[str, Any]
    own: Any = flax.struct.field(pytree_node=False)
    ropes: tuple[int, ...] = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Context:
    """The arrays that all layers share.

    Attributes:
        query_positions: int32 (B, T).
        key_positions: int32 (B, S), negative if there is no token; S is T without a cache.
        valid: bool (B, T), False at padding.
        rotations: float32 (2, B, T, pairs), cosine and sine, for each rotary setting.
        growths: float32 (B, T), factor on the queries, for each rotary setting; None if queries do not grow.
        inputs: (L, B, T, P), the per-layer inputs, see `layer_inputs`; None without any.
        seen: bool (B, T, S), an extra mask of the keys that a query may attend to; None for all.
    """

    query_positions: jax.Array
    key_positions: jax.Array
    valid: jax.Array
    rotations: tuple[jax.Array, ...]
    growths: tuple[jax.Array, ...] | None = None
    inputs: jax.Array | None = None
    seen: jax.Array | None = None


@dataclass(frozen=True)
class Run:
    """One run of one layer: its settings, arrays and captures.

    Attributes:
        capture: records the inputs and outputs of modules.
        stream: (B, T, H), the residual stream before the block, before any norm.
    """

    settings: BlockSettings
    layer: LayerWeights
    context: Context
    capture: LayerCapture
    stream: jax.Array

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The tensors of the layer."""
        return self.layer.tensors

    def module(self, role: str, x: jax.Array) -> jax.Array:
        """Run a linear module on x (..., I), with bias and adapter, and record its input and output.

        The input factor is applied before recording, the output factor after it.
        """
        layer, settings = self.layer, self.settings
        x = _times(dict(settings.input_factors).get(role), x)
        out = linear(x, layer.weights[role])
        if role in layer.biases:
            out = out + layer.biases[role].astype(jnp.float32)
        if role in layer.factors:
            # `linear` rounds x for a packed weight as well.
            out = layer.factors[role].apply(x.astype(jnp.bfloat16) if is_packed(layer.weights[role]) else x, out)
        self.capture.inputs[layer.own.sites[role]] = x
        self.capture.outputs[role] = checkpoint_name(out.astype(x.dtype), MODULE_OUTPUT)
        return _times(dict(settings.output_factors).get(role), self.capture.outputs[role])

    def norm(self, place: str, x: jax.Array) -> jax.Array:
        """Apply the norm at a place; return x if the layer has none there."""
        layer = self.layer
        if place not in layer.norms:
            return x
        if self.settings.layer_norm:
            return layer_norm(x, layer.norms[place], layer.norm_biases.get(place), self.settings.eps)
        return rms_norm(x, layer.norms[place], self.settings.eps)

    def activate(self, x: jax.Array) -> jax.Array:
        """Apply the activation with its parameters in this layer."""
        return ACTIVATIONS[self.settings.activation](x, *self.layer.activation)

    def of_rope(self, arrays: tuple[jax.Array, ...]) -> jax.Array:
        """Choose the array of the layer's rotary setting."""
        own = self.layer.ropes
        return arrays[own[0]] if len(own) == 1 else jnp.stack(arrays)[self.layer.rope]

    def added(self, place: str, out: jax.Array) -> jax.Array:
        """Return what a block adds to the residual stream: its output, after its norm and times a factor."""
        out, scale = self.norm(place, out), self.settings.residual_scale
        return out if scale == 1.0 else out * jnp.asarray(scale, out.dtype)


def _times(factor: float | None, x: jax.Array) -> jax.Array:
    return x if factor is None else x * jnp.asarray(factor, x.dtype)


EMPTY = -1  # position of a slot without a token
_SLOTS = 3  # the axis of slots in keys and values


@flax.struct.dataclass
class KeysValues:
    """Keys and values of one kind of attention, (L, B, kv_heads, S, D) each; in latent attention they differ in D.

    They are float32, bfloat16, or bfloat16 bits as uint16, which a CPU copies faster. Keys are already rotated.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def form(cls, shape: tuple[int, ...], sizes: tuple[int, int], dtype: DTypeLike) -> "KeysValues":
        """Return the shapes of one layer, given (B, kv_heads, S) and the sizes D of keys and values."""
        return jax.eval_shape(lambda: cls(*(jnp.zeros((*shape, size), dtype) for size in sizes)))


@flax.struct.dataclass
class KVCache:
    """The state of all layers for B texts in S slots, filled from the first on, padding included.

    Attributes:
        positions: int32 (B, S), position of the token in a slot, -1 for padding and free slots.
        filled: int32 scalar, slots in use; the same for all sequences.
        states: kind of a state, see `Block.states` -> its arrays (L, B, ...), for the L layers with it in order.
            `LayerWeights.places` has the index of a layer.
        last_only: static, whether only the last layer with keys is kept (L is 1), see `last_keys`.
    """

    positions: jax.Array
    filled: jax.Array
    states: dict[str, Any]
    last_only: bool = flax.struct.field(pytree_node=False, default=False)

    def with_state(self, kind: str, state: Any) -> "KVCache":
        """Return the cache with the state of one kind replaced."""
        return dataclasses.replace(self, states={**self.states, kind: state})


def of_sequences(cache: KVCache, chosen: jax.Array) -> KVCache:
    """Return the cache of the sequences `chosen`, int32 (B,); repeats are allowed."""
    found = jax.tree.map(lambda x: x[:, chosen], cache.states)
    return dataclasses.replace(cache, positions=cache.positions[chosen], states=found)


def blank_sequences(cache: KVCache, rows: int, slots: int) -> KVCache:
    """Return an empty cache like `cache`, but for `rows` sequences of up to `slots` tokens."""

    def blank(x: jax.Array, *, keys: bool) -> jax.Array:
        sizes = [x.shape[0], rows, *x.shape[2:]]
        if keys:
            sizes[_SLOTS] = slots
        return jnp.zeros(sizes, x.dtype)

    states = {
        kind: jax.tree.map(partial(blank, keys=isinstance(state, KeysValues)), state)
        for kind, state in cache.states.items()
    }
    return dataclasses.replace(cache, positions=jnp.full((rows, slots), EMPTY, jnp.int32), states=states)


def put_sequence(cache: KVCache, row: jax.Array, other: KVCache, number: jax.Array, end: jax.Array) -> KVCache:
    """Replace sequence `row` by sequence `number` of another cache, right-aligned so that its slots end at `end`.

    The other slots of the row become empty.
    """

    def put(old: jax.Array, new: jax.Array, *, axis: int = 1, slots: int | None = None) -> jax.Array:
        start = [jnp.zeros((), jnp.int32)] * old.ndim
        start[axis] = row
        if slots is not None:
            start[slots] = end - new.shape[slots]
        return lax.dynamic_update_slice(old, lax.dynamic_slice_in_dim(new, number, 1, axis), start)

    emptied = cache.positions.at[row].set(EMPTY)
    states = {
        kind: jax.tree.map(partial(put, slots=_SLOTS if isinstance(state, KeysValues) else None), state, new)
        for (kind, state), new in zip(cache.states.items(), map(other.states.get, cache.states), strict=True)
    }
    return dataclasses.replace(cache, positions=put(emptied, other.positions, axis=0, slots=1), states=states)


def append_positions(cache: KVCache, positions: jax.Array) -> KVCache:
    """Add the positions (B, T) of new tokens, -1 for padding, before their keys and values."""
    added = lax.dynamic_update_slice(cache.positions, positions, (jnp.zeros((), jnp.int32), cache.filled))
    return dataclasses.replace(cache, positions=added)


def append_layer(
    cache: KVCache | None, run: Run, kind: str, keys: jax.Array, values: jax.Array
) -> tuple[KVCache | None, jax.Array, jax.Array]:
    """Write the keys and values (B, kv_heads, T, D) of new tokens after the filled slots of the running layer.

    Returns:
        The new cache, and all keys and all values of the layer, (B, kv_heads, S, D); without a cache only the new ones.
    """
    if cache is None:
        return None, keys, values
    if cache.last_only:
        kept = KeysValues(keys[None], values[None]) if kind in cache.states else None
        return (cache if kept is None else cache.with_state(kind, kept)), keys, values
    zero, place = jnp.zeros((), jnp.int32), run.layer.places[kind]
    at, old = (place, zero, zero, cache.filled, zero), cache.states[kind]
    all_keys = lax.dynamic_update_slice(old.keys, _stored(keys, old.keys.dtype)[None], at)
    all_values = lax.dynamic_update_slice(old.values, _stored(values, old.values.dtype)[None], at)
    return (
        cache.with_state(kind, KeysValues(all_keys, all_values)),
        from_bits(lax.dynamic_index_in_dim(all_keys, place, keepdims=False)),
        from_bits(lax.dynamic_index_in_dim(all_values, place, keepdims=False)),
    )


def last_of_kind(cache: KVCache, kind: str) -> tuple[jax.Array, jax.Array]:
    """Return all keys and values (B, kv_heads, S, D) of the last layer of a kind, see `append_layer`."""
    state = cache.states[kind]
    return from_bits(state.keys[-1]), from_bits(state.values[-1])


def _stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype)
