"""A model for the decoder, as one pytree: weights and an adapter, stacked over the layers, and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.adapter import Adapter, LoRAFactors, split_fused
from jcrosslora.adapter.records import Carried, check_always_active
from jcrosslora.architectures.blocks import LayerInputWeights, module_name
from jcrosslora.architectures.ops import is_packed, linear
from jcrosslora.architectures.run import Update
from jcrosslora.architectures.settings import DecoderSettings
from jcrosslora.checkpoint import ROLES, BaseModel
from jcrosslora.errors import AdapterError

# The kinds of change that a base is run with.
RUN = Carried.LINEAR | Carried.EXPERTS


@flax.struct.dataclass
class Params:
    """The weights of a model; V tokens, H hidden, D head size, L the layers that have an array of the name, in order.

    Attributes:
        head: (V, H) like the embedding, or None if the embedding is the head.
        final_norm: float32 (H,), the gain; `final_norm_bias` is (H,) too, and `head_bias` (V,).
        weights: role -> (L, O, I); packed weights are the bits of bfloat16 as uint16.
        biases: role -> (L, O), for roles with a bias.
        norms: float32 gains, with Gemma's 1 + weight summed, named as in `Family.norms`: "attn" and "mlp" -> (L, H),
            before attention and MLP; "attn_post" and "mlp_post" -> (L, H), after them; "q" and "k" -> (L, D), of query
            and key heads, or (L, heads * D) of all heads together.
        norm_biases: the same for norms that have a bias.
        activation: float32 (L, 1) each, the trained parameters of the activation, if it has any.
        tensors: name in `Family.tensors` -> (L, ...).
        layer_inputs: for models whose layers read more than the residual stream, or None.
    """

    embedding: jax.Array
    head: jax.Array | None
    final_norm: jax.Array
    weights: dict[str, jax.Array]
    biases: dict[str, jax.Array]
    norms: dict[str, jax.Array]
    norm_biases: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    final_norm_bias: jax.Array | None = None
    head_bias: jax.Array | None = None
    activation: tuple[jax.Array, ...] = ()
    tensors: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    layer_inputs: LayerInputWeights | None = None

    @property
    def output_head(self) -> jax.Array:
        """The output head (V, H), which is the embedding in a tied model."""
        return self.embedding if self.head is None else self.head

    @property
    def packed(self) -> bool:
        """Whether the weights of the layers are stored as bits."""
        return any(map(is_packed, self.weights.values()))

    @property
    def stream_dtype(self) -> jnp.dtype:
        """The dtype of the residual stream: the weights', or float32 if they are packed."""
        return jnp.dtype(jnp.float32) if self.packed else self.embedding.dtype

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype of the KV cache: the weights' dtype, or uint16 (bits of bfloat16) if they are packed."""
        return jnp.dtype(jnp.uint16) if self.packed else self.embedding.dtype


@flax.struct.dataclass
class Model:
    """A base, alone or with an adapter. Its arrays are leaves of a pytree; under `jax.jit` its settings are static.

    Attributes:
        adapter: applied unmerged in every module that it updates; None for the base alone. `jax.vmap` over it shares
            the base.
    """

    settings: DecoderSettings = flax.struct.field(pytree_node=False)
    params: Params
    adapter: AppliedAdapter | None = None

    def with_adapter(self, adapter: AppliedAdapter | None) -> Model:
        """Return the base with another adapter, or alone; the weights are shared."""
        return Model(self.settings, self.params, adapter)

    def of_tokens(self, kept: np.ndarray) -> Model:
        """Return the model with the embeddings of only these tokens (V,) and without a head."""
        params, inputs = self.params, self.params.layer_inputs
        if inputs is not None:
            inputs = dataclasses.replace(inputs, embedding=inputs.embedding[kept])
        params = dataclasses.replace(params, embedding=params.embedding[kept], head=None, layer_inputs=inputs)
        return dataclasses.replace(self, params=params)


class AppliedAdapter(Protocol):
    """What the decoder adds to a base: a pytree like `StackedAdapter`."""

    @property
    def roles(self) -> Mapping[str, Update]:
        """The changes by role; their leaves have a first axis of the L layers with that role."""
        ...


@flax.struct.dataclass
class StackedFactors:
    """The updates dW = b @ a of one role in the L layers that have it; zeros in those without an update.

    They are float32 (L, K, I) and (L, O, K), or (N, L, ...) of N adapters; b is multiplied by the scale.
    """

    a: jax.Array
    b: jax.Array

    def apply(self, x: jax.Array, out: jax.Array) -> jax.Array:
        """Add the update, see `Update`."""
        return out + update(x, self)


@flax.struct.dataclass
class StackedAdapter:
    """An adapter as the decoder applies it, unmerged.

    Attributes:
        roles: role -> factors, for roles with an update; "gate_up" and "down" of experts, with an axis of E after L.
    """

    roles: dict[str, StackedFactors]


def stack_adapter(adapter: Adapter, base: BaseModel) -> StackedAdapter:
    """Stack the factors of an adapter, padded with zeros to the largest rank of each role.

    Splits updates of fused matrices, e.g. phi3's qkv_proj.

    Raises:
        AdapterError: the base lacks a module, factors do not fit it, or the adapter is an aLoRA.
    """
    return _stacked([adapter], base)[0]


def stack_adapters(adapters: Sequence[Adapter], base: BaseModel) -> StackedAdapter:
    """Stack several adapters along a first axis, for `jax.vmap`, with the roles of all of them.

    Raises:
        AdapterError: there is no adapter, or one does not fit the base (see `stack_adapter`).
    """
    if not adapters:
        raise AdapterError("there are no adapters to stack; give at least one")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *_stacked(adapters, base))


def _stacked(adapters: Sequence[Adapter], base: BaseModel) -> list[StackedAdapter]:
    adapters = [split_fused(adapter, base.fused) for adapter in adapters]
    ranks, of_experts = _ranks(adapters, base), _stack_experts(adapters, base)
    return [
        StackedAdapter({role: _stack_role(one, base, role, rank) for role, rank in ranks.items()} | own)
        for one, own in zip(adapters, of_experts, strict=True)
    ]


def unstack_adapter(stacked: StackedAdapter, base: BaseModel) -> Adapter:
    """Return an adapter with scale 1, without modules where both factors are zero."""
    modules = {}
    for role in (role for role in ROLES if role in stacked.roles):
        factors = stacked.roles[role]
        for layer, a, b in zip(base.layers_with(role), np.asarray(factors.a), np.asarray(factors.b), strict=True):
            if a.any() or b.any():
                modules[module_name(layer, role)] = LoRAFactors(a=a, b=b)
    return Adapter(modules=modules)


def join_stacked(first: StackedAdapter, second: StackedAdapter) -> StackedAdapter:
    """Add two adapters of one base by concatenating the factors of their common roles, which adds the ranks."""
    roles = dict(first.roles)
    for role, added in second.roles.items():
        if role in roles:
            a = jnp.concatenate([roles[role].a, added.a], axis=-2)
            roles[role] = StackedFactors(a, jnp.concatenate([roles[role].b, added.b], axis=-1))
        else:
            roles[role] = added
    return StackedAdapter(roles)


def update(x: jax.Array, factors: StackedFactors) -> jax.Array:
    """Return b (a x), float32 (..., O), for x (..., I) and the factors of one layer.

    The products are float32; for a bfloat16 x the factors are rounded and the products accumulated in float32.
    """
    return _low_rank(x, factors.a, factors.b)


# JAX's own rule transposes the whole gradient for the derivative by b, fused with the operations that produce it, which
# takes a fifth of a training step on a CPU (profiled). This rule transposes an array that is K wide.
@jax.custom_vjp
def _low_rank(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return _low_rank_forward(x, a, b)[0]


def _low_rank_forward(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    inner = linear(x, a.astype(x.dtype)).astype(x.dtype)
    return linear(inner, b.astype(x.dtype)), (x, inner, a, b)


def _low_rank_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, inner, a, b = kept
    gradient = gradient.astype(x.dtype)
    by_inner = linear(gradient, b.T.astype(x.dtype)).astype(x.dtype)
    flat = by_inner.reshape(-1, by_inner.shape[-1])
    by_a = linear(flat.T, x.reshape(-1, x.shape[-1]).T)
    # Without the barrier, XLA would swap the transposed product, which takes a CPU several times as long.
    by_b = lax.optimization_barrier(linear(inner.reshape(flat.shape).T, gradient.reshape(-1, gradient.shape[-1]).T)).T
    return linear(by_inner, a.T.astype(x.dtype)).astype(x.dtype), by_a, by_b


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _stack_experts(adapters: Sequence[Adapter], base: BaseModel) -> list[dict[str, StackedFactors]]:
    """Stack the updates of experts of each adapter, a (L, E, K, I) and b (L, E, O, K), with the ranks of all."""
    updates = [update for adapter in adapters for update in adapter.experts]
    ranks: dict[str, int] = {}
    for update in updates:
        ranks[update.matrix] = max(ranks.get(update.matrix, 0), update.a.shape[1])
    layers, experts = base.layers_with("router"), base.family.experts
    if not ranks:
        return [{} for _ in adapters]
    if experts is None or any(update.layer not in layers for update in updates):
        msg = f"{adapters[0].info.name}: updates experts that {base.ref} does not have; give the base it was trained on"
        raise AdapterError(msg)
    found = []
    for adapter in adapters:
        stacks = {}
        for matrix, rank in ranks.items():
            count, rows, columns = base.experts.shape(matrix)
            a = np.zeros((len(layers), count, rank, columns), np.float32)
            b = np.zeros((len(layers), count, rows, rank), np.float32)
            for update in (one for one in adapter.experts if one.matrix == matrix):
                place, own = layers.index(update.layer), update.b
                if experts.interleaved and matrix == "gate_up":
                    own = np.concatenate([own[:, ::2], own[:, 1::2]], axis=1)
                a[place, :, : own.shape[2]], b[place, :, :, : own.shape[2]] = update.a, own
            stacks[matrix] = StackedFactors(jnp.asarray(a), jnp.asarray(b))
        found.append(stacks)
    return found


def _ranks(adapters: Iterable[Adapter], base: BaseModel) -> dict[str, int]:
    found: dict[str, int] = {}
    for adapter in adapters:
        check_always_active(adapter, "which the decoder does not support: use an adapter that is always active")
        for name, factors in adapter.modules.items():
            role = _check_fit(name, factors, adapter, base)
            found[role] = max(found.get(role, 0), factors.rank)
    return {role: found[role] for role in ROLES if role in found}


def _check_fit(name: str, factors: LoRAFactors, adapter: Adapter, base: BaseModel) -> str:
    module = base.modules.get(name)
    if module is None:
        msg = f"{adapter.info.name}: updates {name}, which {base.ref} does not have: give the base it was trained on"
        raise AdapterError(msg)
    if factors.shape != module.shape or factors.b.shape[1] != factors.rank:
        shapes = f"A {list(factors.a.shape)} and B {list(factors.b.shape)}"
        msg = f"{adapter.info.name}: {name} has {shapes}, {base.ref} wants an update of {list(module.shape)}: "
        raise AdapterError(msg + "give the base it was trained on")
    return module.role


def _stack_role(adapter: Adapter, base: BaseModel, role: str, rank: int) -> StackedFactors:
    layers, (rows, columns) = base.layers_with(role), base.architecture.role_shapes[role]
    a, b = np.zeros((len(layers), rank, columns), np.float32), np.zeros((len(layers), rows, rank), np.float32)
    for place, layer in enumerate(layers):
        factors = adapter.modules.get(module_name(layer, role))
        if factors is not None:
            a[place, : factors.rank] = np.asarray(factors.a, np.float32)
            b[place, :, : factors.rank] = np.asarray(factors.b, np.float32) * np.float32(factors.scale)
    return StackedFactors(jnp.asarray(a), jnp.asarray(b))
