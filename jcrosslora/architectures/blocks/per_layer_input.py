"""The inputs that each layer of some models has beside the stream: per-layer embeddings, as in Gemma 4.

Each is the sum of a row of an embedding of its own, by the token, and of a projection of the stream before the first
layer. Follows `Gemma4TextModel` of transformers.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.architectures.blocks.block import Block, Linear, Norm
from jcrosslora.architectures.ops import ACTIVATIONS, linear, rms_norm, rows_at
from jcrosslora.architectures.run import KVCache, Run


@dataclass(frozen=True)
class PerLayerInput(Block):
    """A step behind the MLP that multiplies the stream with an input of the layer."""

    hidden: int
    features: int

    LINEARS: ClassVar = (
        Linear("per_layer_input_gate", "per_layer_input_gate", "per_layer_in", None, "inp_gate"),
        Linear(
            "per_layer_projection", "per_layer_projection", "per_layer_out_in", "per_layer_out", "proj", stream="writes"
        ),
    )
    GGUF_NORMS: ClassVar = {"per_layer_out": "post_norm"}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return role -> (O, I)."""
        return {
            "per_layer_input_gate": (self.features, self.hidden),
            "per_layer_projection": (self.hidden, self.features),
        }

    def norms(self) -> dict[str, Norm]:
        """Return the norm behind it."""
        return {"per_layer_out": Norm("per_layer_out", self.hidden)}

    def forward(self, run: Run, x: jax.Array, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Run the step on the stream itself; see `Block.forward`."""
        assert run.context.inputs is not None
        gate = ACTIVATIONS[run.settings.activation](run.module("per_layer_input_gate", x))
        inner = gate * lax.dynamic_index_in_dim(run.context.inputs, run.layer.layer, keepdims=False)
        return run.norm("per_layer_out", run.module("per_layer_projection", inner)), cache


@flax.struct.dataclass
class LayerInputWeights:
    """The weights of the inputs of all layers; L layers, P features of an input.

    Attributes:
        embedding: (V, L * P).
        projection: (L * P, H).
        norm: float32 (P,), gain of the norm behind the projection.
    """

    embedding: jax.Array
    projection: jax.Array
    norm: jax.Array


def layer_inputs(weights: LayerInputWeights | None, tokens: jax.Array, x: jax.Array, eps: float) -> jax.Array | None:
    """Return the inputs of all layers, (L, B, T, P) in the dtype of x; None in a model without any.

    Args:
        weights: of the inputs, or None.
        tokens: int32 (B, T).
        x: (B, T, H), the stream before the first layer.
        eps: added to the mean square in the norm.
    """
    if weights is None:
        return None
    features = len(weights.norm)
    shape = *x.shape[:2], -1, features
    projected = (linear(x, weights.projection) * x.shape[-1] ** -0.5).astype(x.dtype).reshape(shape)
    projected = rms_norm(projected, weights.norm, eps)
    own = rows_at(weights.embedding, tokens).astype(x.dtype) * jnp.asarray(features**0.5, x.dtype)
    return ((projected + own.reshape(shape)) * jnp.asarray(2**-0.5, x.dtype)).transpose(2, 0, 1, 3)
