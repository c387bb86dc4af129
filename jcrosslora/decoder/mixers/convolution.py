"""Causal convolutions of each feature over a few tokens, whole texts and pieces of them."""

import jax
import jax.numpy as jnp
from jax import lax


def causal_convolution(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, state: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Convolve the tokens of one sequence with those before them, y_t = sum_j weight_j x_(t - K + 1 + j) + bias.

    Args:
        x: float32 (T, C), features of the tokens.
        weight: float32 (C, K).
        bias: float32 (C,), or None.
        state: float32 (K - 1, C), the last tokens before these; zeros at the start of a text.
        valid: bool (T,), False at padding, which stands before or behind the tokens and is skipped.

    Returns:
        (T, C), undefined at padding; and the state for the tokens that follow.
    """
    length, taps = len(x), weight.shape[1]
    count = jnp.sum(valid, dtype=jnp.int32)
    first = jnp.where(count > 0, jnp.argmax(valid).astype(jnp.int32), 0)
    kept = jnp.where(valid[:, None], x, jnp.zeros((), x.dtype))
    rows = jnp.concatenate([jnp.zeros_like(state), kept])
    # In front of the first token, behind any padding.
    rows = lax.dynamic_update_slice_in_dim(rows, state, first, 0)
    # As products of shifted arrays: few taps, and a gradient without the convolution's own rules.
    out = sum((rows[tap : tap + length] * weight[:, tap] for tap in range(taps)), start=jnp.zeros((), x.dtype))
    out = out if bias is None else out + bias
    return out, lax.dynamic_slice_in_dim(rows, first + count, taps - 1, 0)
