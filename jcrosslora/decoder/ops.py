"""The small operations that every layer is made of."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def precision_of(dtype: jnp.dtype) -> lax.Precision:
    """HIGHEST for float32, so that TF32 on a GPU and bfloat16 passes on a TPU do not round it."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """The einsum of two arrays of one dtype, accumulated in float32."""
    return jnp.einsum(spec, left, right, precision=precision_of(left.dtype), preferred_element_type=jnp.float32)


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 (..., O): x (..., I) times weight (O, I) transposed, accumulated in float32.

    Args:
        x: float32 or bfloat16.
        weight: of the same dtype; or, for a float32 x, bfloat16 or the bits of bfloat16 as uint16. Then x is rounded to
            bfloat16 for this product, and so is the gradient that comes back.
    """
    if x.dtype == weight.dtype:
        return product("...i,oi->...o", x, weight)
    return _project_rounded(x, weight)


@jax.custom_vjp
def _project_rounded(x: jax.Array, weight: jax.Array) -> jax.Array:
    return product("...i,oi->...o", x.astype(jnp.bfloat16), _from_bits(weight))


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project_rounded(x, weight), (x, weight)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, weight = kept
    gradient = gradient.astype(jnp.bfloat16)
    by_x = product("...o,oi->...i", gradient, _from_bits(weight))
    if weight.dtype == jnp.uint16:  # integers have no derivative
        return by_x, None
    return by_x, product("...o,...i->oi", gradient, x.astype(jnp.bfloat16)).astype(weight.dtype)


_project_rounded.defvjp(_forward, _backward)


def _from_bits(weight: jax.Array) -> jax.Array:
    # A scan over layers copies each layer's weights out of their stack. XLA's code for a CPU copies bfloat16 element by
    # element, which takes several times as long as the products with it; integers it copies as memory.
    return lax.bitcast_convert_type(weight, jnp.bfloat16) if weight.dtype == jnp.uint16 else weight


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
