"""The small operations that every layer is made of."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: jnp.dtype) -> lax.Precision:
    """HIGHEST for float32, so that TF32 on a GPU and bfloat16 passes on a TPU do not round it."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 (..., O): x (..., I) times weight (O, I) transposed, accumulated in float32."""
    return jnp.einsum("...i,oi->...o", x, weight, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """RMS norm over the last axis times a gain, in float32; the result has the dtype of x."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * gain).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """The soft cap, cap * tanh(x / cap); x itself without a cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
