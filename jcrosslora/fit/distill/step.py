"""The step of one module: the closed-form minimum of the quadratic model of the loss, cut to a low rank."""

import jax
import jax.numpy as jnp

from jcrosslora.linalg import dot

DAMPING = 0.1
FLOOR_IN, FLOOR_OUT = 1e-2, 1e-1


def step_factors(gradient: jax.Array, a: jax.Array, g: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The update of at most `rank` that minimises tr(S' dW) + tr(dW' G dW A) / 2, with A and G damped.

    Without a limit on the rank that is dW = -G^-1 S A^-1. In coordinates in which A and G are the identity the
    quadratic form is a distance, so the best update of a given rank is that dW's truncated SVD there (Eckart-Young).
    The damping is relative to each dimension's own size and, behind that, to the mean eigenvalue: dimensions with
    massive activations would otherwise leave nothing of the others.

    Args:
        gradient: (O, I), the gradient S.
        a: (I, I), sum of x x'.
        g: (O, O), sum of s s'.
        rank: the most that the update may have.

    Returns:
        b (O, rank) and a (rank, I), and what the limit on the rank leaves over of the gradient, (O, I): S + G dW A, the
        gradient of the model behind the step.
    """
    (half_in, root_in), (half_out, root_out) = _roots(a, FLOOR_IN), _roots(g, FLOOR_OUT)
    u, s, vt = jnp.linalg.svd(dot(dot(half_out.T, gradient), half_in), full_matrices=False)
    u, vt = u[:, :rank] * s[:rank], vt[:rank]
    return -dot(half_out, u), dot(vt, half_in.T), gradient - dot(dot(root_out, u), dot(vt, root_in.T))


def _roots(moment: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
    """R with R R' the inverse of the damped moment M, and Q with Q Q' = M and R' Q the identity."""
    sizes = jnp.diagonal(moment)
    scale = jnp.sqrt(sizes + floor * jnp.median(sizes) + jnp.finfo(moment.dtype).tiny)
    values, vectors = jnp.linalg.eigh(moment / scale[:, None] / scale[None])
    damped = jnp.maximum(values, 0) + DAMPING * jnp.mean(jnp.maximum(values, 0)) + jnp.finfo(moment.dtype).eps
    return vectors / jnp.sqrt(damped) / scale[:, None], vectors * jnp.sqrt(damped) * scale[:, None]
