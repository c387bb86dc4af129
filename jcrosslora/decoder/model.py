"""A model as the decoder runs it: weights, settings of the forward pass, and an adapter or none, in one pytree."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jcrosslora.architectures.blocks.per_layer_input import LayerInputWeights
from jcrosslora.architectures.ops import is_packed
from jcrosslora.architectures.settings import DecoderSettings
from jcrosslora.decoder.adapters import AppliedAdapter


@flax.struct.dataclass
class Params:
    """The weights of a model; V tokens, H hidden, D head size, L the layers that have an array of the name, in order.

    Attributes:
        embedding: (V, H).
        head: (V, H), or None if the embedding is the head.
        final_norm: float32 (H,), gain of the final norm.
        weights: role -> (L, O, I); packed weights are the bits of bfloat16 as uint16.
        biases: role -> (L, O), for roles with a bias.
        norms: float32 gains, with Gemma's 1 + weight summed, named as in `Family.norms`: "attn" and "mlp" -> (L, H),
            before attention and MLP; "attn_post" and "mlp_post" -> (L, H), after them; "q" and "k" -> (L, D), of query
            and key heads, or (L, heads * D) of all heads together.
        norm_biases: the same of norms that have a bias.
        final_norm_bias: float32 (H,), or None.
        head_bias: float32 (V,), or None.
        activation: float32 (L, 1) each, the trained parameters of the activation, if it has any.
        tensors: name in `Family.tensors` -> (L, ...).
        layer_inputs: of models whose layers read more than the stream, or None.
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
        """The dtype of the residual stream: that of the weights, or float32 if they are packed."""
        return jnp.dtype(jnp.float32) if self.packed else self.embedding.dtype

    @property
    def cache_dtype(self) -> jnp.dtype:
        """The dtype of keys and values while text is written: that of the weights, which may be bits of bfloat16."""
        return jnp.dtype(jnp.uint16) if self.packed else self.embedding.dtype


@flax.struct.dataclass
class Model:
    """A base, alone or with an adapter. Its arrays are leaves of a pytree; under `jax.jit` its settings are static.

    Attributes:
        settings: of the forward pass.
        params: the weights of the base.
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
        """Return the model with the embeddings of these tokens (V,) alone, and without a head."""
        params, inputs = self.params, self.params.layer_inputs
        if inputs is not None:
            inputs = dataclasses.replace(inputs, embedding=inputs.embedding[kept])
        params = dataclasses.replace(params, embedding=params.embedding[kept], head=None, layer_inputs=inputs)
        return dataclasses.replace(self, params=params)
