"""Linear attention by the gated delta rule, as in Qwen3-Next, Qwen3.5 and OLMo Hybrid (arXiv 2412.06464)."""

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder.mixers.convolution import causal_convolution
from jcrosslora.decoder.mixers.recurrence import grouped_recurrence
from jcrosslora.decoder.mixers.state import MixerLayer, MixerState
from jcrosslora.decoder.ops import rms_norm

_LENGTH_EPS = 1e-6  # added to the square of the length of queries and keys


def gated_delta(layer: MixerLayer, x: jax.Array, state: MixerState, valid: jax.Array) -> tuple[jax.Array, MixerState]:
    """Run the mixer; see `mix`. Follows the classes named `*GatedDeltaNet` of the three models in transformers."""
    mixed, gate, rate, step = (part.astype(jnp.float32) for part in _projected(layer, x))

    def of_text(
        mixed: jax.Array, rate: jax.Array, step: jax.Array, state: MixerState, valid: jax.Array
    ) -> tuple[jax.Array, MixerState]:
        mixed, inputs = causal_convolution(mixed, layer.tensors["conv"], None, state.inputs, valid)
        queries, keys, values = _heads(layer, layer.activate(mixed))
        # Padding neither decays the state nor writes to it.
        kept = valid[:, None]
        beta = jnp.where(kept, layer.mixer.beta_limit * jax.nn.sigmoid(rate), 0.0)
        decay = -jnp.exp(layer.tensors["A_log"]) * jax.nn.softplus(step + layer.tensors["dt_bias"])
        out, matrices = grouped_recurrence(queries, keys, values, jnp.where(kept, decay, 0.0), state.matrices, beta)
        return out, MixerState(inputs, matrices)

    out, state = jax.vmap(of_text)(mixed, rate, step, state, valid)
    out = rms_norm(out, layer.tensors["norm"], layer.eps) * jax.nn.silu(gate.reshape(out.shape))
    return layer.project("delta_out_proj", out.reshape(gate.shape).astype(x.dtype)), state


def _projected(layer: MixerLayer, x: jax.Array) -> tuple[jax.Array, ...]:
    """Return queries, keys and values side by side (B, T, C), gates (B, T, H P), and two numbers a head (B, T, H)."""
    mixer = layer.mixer
    if not mixer.grouped:
        gate, rate, step = (layer.project(role, x) for role in ("in_proj_z", "in_proj_b", "in_proj_a"))
        roles = ("delta_q_proj", "delta_k_proj", "delta_v_proj") if mixer.separate else ("in_proj_qkv",)
        return jnp.concatenate([layer.project(role, x) for role in roles], axis=-1), gate, rate, step
    both, numbers = (
        layer.project(role, x).reshape(*x.shape[:-1], mixer.groups, -1) for role in ("in_proj_qkvz", "in_proj_ba")
    )
    width, each = mixer.key_size, mixer.inner // mixer.groups
    parts = (*jnp.split(both, (width, 2 * width, 2 * width + each), axis=-1), *jnp.split(numbers, 2, axis=-1))
    queries, keys, values, gate, rate, step = (part.reshape(*x.shape[:-1], -1) for part in parts)
    return jnp.concatenate([queries, keys, values], axis=-1), gate, rate, step


def _heads(layer: MixerLayer, mixed: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Split queries and keys (T, G, N), of fixed lengths, and values (T, H, P) out of (T, C)."""
    mixer = layer.mixer
    width = mixer.groups * mixer.key_size
    queries, keys, values = jnp.split(mixed, (width, 2 * width), axis=-1)
    queries, keys = (_unit(part.reshape(len(part), mixer.groups, mixer.key_size)) for part in (queries, keys))
    return queries * mixer.key_size**-0.5, keys, values.reshape(len(values), mixer.heads, mixer.value_size)


def _unit(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _LENGTH_EPS)
