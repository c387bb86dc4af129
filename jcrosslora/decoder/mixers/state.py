"""What mixers keep of the tokens before, and what they are given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

from jcrosslora.checkpoint.family.mixers import Mixer


@flax.struct.dataclass
class MixerState:
    """What a mixer keeps of the tokens before, in place of keys and values.

    Attributes:
        inputs: float32 (..., B, K - 1, C), the last inputs of the convolution.
        matrices: float32 (..., B, H, N, P), the states of the heads; H is 0 for a short convolution.
    """

    inputs: jax.Array
    matrices: jax.Array


def init_state(mixer: Mixer, *batch: int) -> MixerState:
    """Return the state before the first token.

    Args:
        mixer: of the model.
        batch: leading axes, the last of which is B.
    """
    return MixerState(
        jnp.zeros((*batch, mixer.taps - 1, mixer.convolved), jnp.float32),
        jnp.zeros((*batch, mixer.heads, mixer.key_size, mixer.value_size), jnp.float32),
    )


@dataclass(frozen=True)
class MixerLayer:
    """The mixer of one layer.

    Attributes:
        mixer: its kind and sizes.
        project: of a role and its input (B, T, I): the output (B, T, O) of the module, in the dtype of the input.
        tensors: its other tensors, float32, by the names of `Mixer.tensors`.
        activate: the activation behind the convolution of "delta" and "mamba".
        eps: added to the mean square in its norm.
    """

    mixer: Mixer
    project: Callable[[str, jax.Array], jax.Array]
    tensors: Mapping[str, jax.Array]
    activate: Callable[[jax.Array], jax.Array]
    eps: float
