"""The inputs that each layer of some models has beside the stream: per-layer embeddings, as in Gemma 4.

Each is the sum of a row of an embedding of its own, by the token, and of a projection of the stream before the first
layer. Follows `Gemma4TextModel` of transformers.
"""

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.decoder.ops import linear, rms_norm, rows_at
from jcrosslora.decoder.settings import DecoderSettings


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


def layer_inputs(
    settings: DecoderSettings, weights: LayerInputWeights | None, tokens: jax.Array, x: jax.Array
) -> jax.Array | None:
    """Return the inputs of all layers, (L, B, T, P) in the dtype of x; None in a model without any.

    Args:
        settings: of the model.
        weights: its weights, or None.
        tokens: int32 (B, T).
        x: (B, T, H), the stream before the first layer.
    """
    if weights is None:
        return None
    shape = *x.shape[:2], -1, settings.layer_inputs
    projected = (linear(x, weights.projection) * settings.hidden**-0.5).astype(x.dtype).reshape(shape)
    projected = rms_norm(projected, weights.norm, settings.eps)
    own = rows_at(weights.embedding, tokens).astype(x.dtype) * jnp.asarray(settings.layer_inputs**0.5, x.dtype)
    return ((projected + own.reshape(shape)) * jnp.asarray(2**-0.5, x.dtype)).transpose(2, 0, 1, 3)
