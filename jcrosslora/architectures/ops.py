"""The basic operations of a layer."""

from collections.abc import Callable, Mapping
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


def einsum(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """Multiply two arrays of one dtype and accumulate in float32.

    float32 uses HIGHEST precision, so that TF32 on a GPU and bfloat16 passes on a TPU do not round it.
    """
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    return jnp.einsum(spec, left, right, precision=precision, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class Row:
    """One array, at an index (int32), of a stack (N, ...); unlike a slice, it is not copied as a whole."""

    stack: jax.Array
    index: jax.Array

    @property
    def array(self) -> jax.Array:
        """The array, on the device."""
        return on_device(lax.dynamic_index_in_dim(self.stack, self.index, keepdims=False))


def on_host(array: jax.Array) -> bool:
    """Return whether an array is in host memory, from which device programs read it."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def on_device(array: jax.Array) -> jax.Array:
    """Move an array from host memory to the device; return other arrays unchanged."""
    return jax.device_put(array, jax.memory.Space.Device) if on_host(array) else array


def is_packed(weight: "jax.Array | Row") -> bool:
    """Return whether a weight is bfloat16 bits as uint16, see `linear`."""
    return (weight.stack if isinstance(weight, Row) else weight).dtype == jnp.uint16


def linear(x: jax.Array, weight: "jax.Array | Row") -> jax.Array:
    """Multiply x (..., I) with the transpose of a weight (O, I): float32 (..., O), accumulated in float32.

    Both are float32 or bfloat16. For a float32 x, the weight may also be bfloat16 or its bits as uint16; x and the
    incoming gradient are then rounded to bfloat16 for this product. A `Row` is read again in the backward pass.
    """
    if isinstance(weight, Row):
        return _linear_row(x, weight.stack, weight.index)
    if x.dtype == weight.dtype:
        return einsum("...i,oi->...o", x, weight)
    return _linear_rounded(x, weight)


# Without this rule, a scan keeps a second copy of all layers' weights for the backward pass.
@jax.custom_vjp
def _linear_row(x: jax.Array, stack: jax.Array, index: jax.Array) -> jax.Array:
    return linear(x, Row(stack, index).array)


def _row_forward(x: jax.Array, stack: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _linear_row(x, stack, index), (x, stack, index)


def _row_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    x, stack, index = kept
    weight = Row(stack, index).array
    if is_packed(stack):  # integers have no derivative
        return jax.vjp(lambda x: linear(x, weight), x)[1](gradient)[0], None, None
    by_x, by_weight = jax.vjp(linear, x, weight)[1](gradient)
    return by_x, jnp.zeros_like(stack).at[index].set(by_weight), None


_linear_row.defvjp(_row_forward, _row_backward)


@jax.custom_vjp
def _linear_rounded(x: jax.Array, weight: jax.Array) -> jax.Array:
    return einsum("...i,oi->...o", x.astype(jnp.bfloat16), from_bits(weight))


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear_rounded(x, weight), (x, weight)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, weight = kept
    gradient = gradient.astype(jnp.bfloat16)
    by_x = einsum("...o,oi->...i", gradient, from_bits(weight))
    if is_packed(weight):  # integers have no derivative
        return by_x, None
    return by_x, einsum("...o,...i->oi", gradient, x.astype(jnp.bfloat16)).astype(weight.dtype)


_linear_rounded.defvjp(_forward, _backward)


def from_bits(weight: jax.Array) -> jax.Array:
    """Convert bfloat16 bits (uint16) to bfloat16; return other arrays unchanged."""
    # A scan over layers copies each layer's weights out of their stack. On a CPU, XLA copies bfloat16 element by
    # element, which takes several times as long as the products; it copies integers as memory.
    return lax.bitcast_convert_type(weight, jnp.bfloat16) if is_packed(weight) else weight


def rows_at(matrix: jax.Array, places: jax.Array) -> jax.Array:
    """Take rows of a matrix."""
    # On a CPU, XLA has no bfloat16 gather and would convert the whole matrix to float32 before a loop. The barrier
    # keeps the matrix from being a loop constant, so only the rows are converted.
    matrix, places = lax.optimization_barrier((matrix, places))
    return matrix[places]


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis to RMS 1 and multiply with a gain, in float32; the result has the dtype of x."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (normed * gain).astype(x.dtype)


def layer_norm(x: jax.Array, gain: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Normalise the last axis to mean 0 and variance 1, apply gain and bias in float32; return the dtype of x."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps) * gain
    return (normed if bias is None else normed + bias).astype(x.dtype)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Return cap * tanh(x / cap), or x if there is no cap."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def _xielu(x: jax.Array, positive: jax.Array, negative: jax.Array, beta: jax.Array, eps: jax.Array) -> jax.Array:
    """Apply xIELU (arXiv 2411.13010); its trained parameters, float32 (1,), are given before the softplus."""
    wide, (positive, negative) = x.astype(jnp.float32), map(jax.nn.softplus, (positive, negative))
    below = (jnp.expm1(jnp.minimum(wide, eps)) - wide) * (negative + beta)
    return (jnp.where(wide > 0, positive * wide * wide, below) + beta * wide).astype(x.dtype)


# Each takes an array and any trained parameters of the activation.
ACTIVATIONS: Mapping[str, Callable[..., jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "xielu": _xielu,
}
