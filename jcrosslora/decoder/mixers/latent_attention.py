"""Latent attention (DeepSeek V2, arXiv 2405.04434): keys and values are made of a small latent of the stream.

The cache holds the keys and values of all heads, not the latents.
"""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.attention import KVCache, apply_rope
from jcrosslora.decoder.layer import Context, LayerCapture, LayerWeights, of_layer, run_module
from jcrosslora.decoder.mixers.self_attention import attend, grown
from jcrosslora.decoder.ops import rms_norm
from jcrosslora.decoder.settings import DecoderSettings

_EPS = 1e-6  # of the norms of latents, whatever the configuration says of others


def latent_attention(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    normed: jax.Array,
    cache: KVCache | None,
    capture: LayerCapture,
) -> tuple[jax.Array, KVCache | None]:
    """Run the attention of a layer on the normed stream (B, T, H).

    Returns:
        (B, T, H), the output of o_proj, and the cache with the layer's keys and values.
    """
    sizes, rotation = settings.latent, of_layer(settings, layer, context.rotations)
    assert sizes is not None

    def rotated(x: jax.Array) -> jax.Array:
        return apply_rope(x, rotation, interleaved=settings.interleaved)

    latent = run_module("kv_a_proj_with_mqa", layer, normed, capture)
    latent, shared = latent[..., : sizes.rank], latent[..., None, sizes.rank :]
    both = run_module("kv_b_proj", layer, rms_norm(latent, layer.norms["kv_a"], _EPS), capture)
    keys, values = jnp.split(both.reshape(*both.shape[:2], settings.heads, -1), [sizes.plain], axis=-1)
    shared = jnp.broadcast_to(rotated(shared), (*keys.shape[:3], sizes.rotated))
    keys = jnp.concatenate([keys, shared], axis=-1).swapaxes(1, 2)
    values = values.swapaxes(1, 2)
    queries = _queries(layer, normed, capture)
    queries = queries.reshape(*queries.shape[:2], settings.heads, -1)
    plain, turned = jnp.split(queries, [sizes.plain], axis=-1)
    queries = grown(settings, layer, context, jnp.concatenate([plain, rotated(turned)], axis=-1))
    mixed, cache = attend(settings, layer, context, queries, keys, values, cache)
    return run_module("o_proj", layer, mixed, capture), cache


def _queries(layer: LayerWeights, normed: jax.Array, capture: LayerCapture) -> jax.Array:
    if "q_proj" in layer.weights:
        return run_module("q_proj", layer, normed, capture)
    latent = run_module("q_a_proj", layer, normed, capture)
    return run_module("q_b_proj", layer, rms_norm(latent, layer.norms["q_a"], _EPS), capture)
