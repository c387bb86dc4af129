"""State-space layers as in Mamba 2 (arXiv 2405.21060)."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.mixers.convolution import causal_convolution
from jcrosslora.decoder.mixers.recurrence import grouped_recurrence
from jcrosslora.decoder.mixers.state import MixerLayer, MixerState
from jcrosslora.decoder.ops import rms_norm


def mamba(layer: MixerLayer, x: jax.Array, state: MixerState, valid: jax.Array) -> tuple[jax.Array, MixerState]:
    """Run the mixer; see `mix`. Follows `GraniteMoeHybridMambaLayer` and `FalconH1Mixer` of transformers."""
    mixer = layer.mixer
    projected = _scaled(layer, layer.project("mamba_in_proj", x).astype(jnp.float32))
    gate, mixed, step = jnp.split(projected, (mixer.inner, mixer.inner + mixer.convolved), axis=-1)

    def of_text(mixed: jax.Array, step: jax.Array, state: MixerState, valid: jax.Array) -> tuple[jax.Array, MixerState]:
        tensors, groups = layer.tensors, (len(mixed), mixer.groups, mixer.key_size)
        mixed, inputs = causal_convolution(mixed, tensors["conv"], tensors.get("conv_bias"), state.inputs, valid)
        widths = (mixer.inner, mixer.inner + mixer.groups * mixer.key_size)
        values, keys, queries = jnp.split(layer.activate(mixed), widths, axis=-1)
        values = values.reshape(len(mixed), mixer.heads, mixer.value_size)
        step = jnp.clip(jax.nn.softplus(step + tensors["dt_bias"]), *mixer.step_limits)
        # Padding neither decays the state nor writes to it.
        step = jnp.where(valid[:, None], step, 0.0)
        out, matrices = grouped_recurrence(
            queries.reshape(groups),
            keys.reshape(groups),
            values * step[..., None],
            -jnp.exp(tensors["A_log"]) * step,
            state.matrices,
        )
        out = out + values * tensors["D"][:, None]
        return out.reshape(len(out), mixer.inner), MixerState(inputs, matrices)

    out, state = jax.vmap(of_text)(mixed, step, state, valid)
    return layer.project("mamba_out_proj", _gated(layer, out, jax.nn.silu(gate)).astype(x.dtype)), state


def _scaled(layer: MixerLayer, projected: jax.Array) -> jax.Array:
    """Apply Falcon's factors on gate, values, keys, queries and time steps."""
    mixer = layer.mixer
    if not mixer.factors:
        return projected
    group = mixer.groups * mixer.key_size
    widths = (mixer.inner, mixer.inner, group, group, mixer.heads)
    factors = jnp.repeat(
        jnp.asarray(mixer.factors, jnp.float32), jnp.asarray(widths), total_repeat_length=projected.shape[-1]
    )
    return projected * factors


def _gated(layer: MixerLayer, out: jax.Array, gate: jax.Array) -> jax.Array:
    match layer.mixer.norm:
        case None:
            return out * gate
        case "before the gate":
            return _group_norm(layer, out) * gate
        case "behind the gate":
            return _group_norm(layer, out * gate)


def _group_norm(layer: MixerLayer, x: jax.Array) -> jax.Array:
    groups = x.reshape(*x.shape[:-1], layer.mixer.groups, -1)
    gain = layer.tensors["norm"].reshape(layer.mixer.groups, -1)
    return rms_norm(groups, gain, layer.eps).reshape(x.shape)
