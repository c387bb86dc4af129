"""The gated short convolution of LFM2."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.mixers.convolution import causal_convolution
from jcrosslora.decoder.mixers.state import MixerLayer, MixerState


def short_convolution(
    layer: MixerLayer, x: jax.Array, state: MixerState, valid: jax.Array
) -> tuple[jax.Array, MixerState]:
    """Run the mixer; see `mix`. Follows `Lfm2ShortConv` of transformers."""
    before, behind, inner = jnp.split(layer.project("conv_in_proj", x).astype(jnp.float32), 3, axis=-1)
    weight, bias = layer.tensors["conv"], layer.tensors.get("conv_bias")
    convolve = jax.vmap(causal_convolution, (0, None, None, 0, 0))
    mixed, inputs = convolve(before * inner, weight, bias, state.inputs, valid)
    out = layer.project("conv_out_proj", (behind * mixed).astype(x.dtype))
    return out, state.replace(inputs=inputs)  # pyright: ignore[reportAttributeAccessIssue]
