"""Run the mixer of a layer on texts, or on the next piece of them."""

import jax

from jcrosslora.decoder.mixers.delta import gated_delta
from jcrosslora.decoder.mixers.mamba import mamba
from jcrosslora.decoder.mixers.short_convolution import short_convolution
from jcrosslora.decoder.mixers.state import MixerLayer, MixerState

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
