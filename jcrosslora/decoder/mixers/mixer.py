"""Run the mixer of a layer, alone or beside attention, on texts or on the next piece of them."""

import dataclasses
from functools import partial

import jax
from jax import lax

from jcrosslora.decoder.attention import KVCache
from jcrosslora.decoder.layer import Context, LayerCapture, LayerWeights, run_module
from jcrosslora.decoder.mixers.delta import gated_delta
from jcrosslora.decoder.mixers.mamba import mamba
from jcrosslora.decoder.mixers.self_attention import self_attention
from jcrosslora.decoder.mixers.short_convolution import short_convolution
from jcrosslora.decoder.mixers.state import MixerLayer, MixerState, init_state
from jcrosslora.decoder.ops import ACTIVATIONS, Row
from jcrosslora.decoder.settings import DecoderSettings

_MIXERS = {"convolution": short_convolution, "delta": gated_delta, "mamba": mamba}


def mix(layer: MixerLayer, x: jax.Array, state: MixerState, valid: jax.Array) -> tuple[jax.Array, MixerState]:
    """Run a mixer.

    Args:
        layer: its settings, modules and tensors.
        x: (B, T, hidden), normalised.
        state: after the tokens before, without leading axes.
        valid: bool (B, T), False at padding, which leaves the state as it is.

    Returns:
        (B, T, hidden), and the state after these tokens.
    """
    return _MIXERS[layer.mixer.kind](layer, x, state, valid)


def run_mixer(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    normed: jax.Array,
    cache: KVCache | None,
    capture: LayerCapture,
) -> tuple[jax.Array, KVCache | None]:
    """Run the mixer of a layer on the normed stream (B, T, H).

    Returns:
        (B, T, H), the output of its last module, and the cache with the layer's state.
    """
    mixer = settings.mixer
    assert mixer is not None
    own = {name: layer.tensors[name] for name in mixer.tensors()}
    tensors = {name: x.array if isinstance(x, Row) else x for name, x in own.items()}
    if not mixer.open_output:
        biases = {"mamba_out_proj": tensors["mamba_out_bias"]} if mixer.output_bias else {}
        weights = {**layer.weights, "mamba_out_proj": layer.tensors["mamba_out_proj"]}
        layer = dataclasses.replace(layer, weights=weights, biases={**layer.biases, **biases})
    held = MixerLayer(
        mixer,
        project=lambda role, x: run_module(role, layer, x, capture),
        tensors=tensors | {"conv": tensors["conv"][:, 0]},
        activate=ACTIVATIONS[mixer.activation or settings.activation],
        eps=settings.eps if mixer.eps is None else mixer.eps,
    )
    if cache is None:
        return mix(held, normed, init_state(mixer, len(normed)), context.valid)[0], None
    states = cache.states[mixer.kind]
    state = jax.tree.map(partial(lax.dynamic_index_in_dim, index=layer.place, axis=0, keepdims=False), states)
    out, state = mix(held, normed, state, context.valid)
    changed = jax.tree.map(lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, layer.place, 0), states, state)
    return out, cache.replace(  # pyright: ignore[reportAttributeAccessIssue]
        states={**cache.states, mixer.kind: changed}
    )


def beside_attention(
    settings: DecoderSettings,
    layer: LayerWeights,
    context: Context,
    normed: jax.Array,
    cache: KVCache | None,
    capture: LayerCapture,
) -> tuple[jax.Array, KVCache | None]:
    """Run the mixer and the attention of a layer on the same stream and add what they return; see `run_mixer`."""
    mixed, cache = run_mixer(settings, layer, context, normed, cache, capture)
    attended, cache = self_attention(settings, layer, context, normed, cache, capture)
    return mixed + attended, cache
