"""The step of each module: the closed-form minimum of the quadratic model of the loss, cut to a low rank."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.decoder import INPUT_SITES, StackedFactors
from jcrosslora.fit.distill.statistics import Statistics
from jcrosslora.linalg import dot

DAMPING = 0.1
FLOOR_IN, FLOOR_OUT = 1e-2, 1e-1


def solve(totals: Statistics, rank: int, parts: int = 1) -> tuple[dict[str, StackedFactors], Statistics]:
    """Compute the step of every module.

    Args:
        totals: sums over `parts` sets of batches.
        rank: the highest rank of each module's step.
        parts: the sums are divided by it, so that steps have comparable lengths.

    Returns:
        role -> b (L, O, rank) and a (L, rank, I), and the sums with the gradient that remains behind the steps.
    """
    steps, gradients = {}, {}
    for role in totals.gradients:
        a, g = totals.inputs[INPUT_SITES[role]], totals.outputs[role]
        own = min(rank, *totals.gradients[role].shape[1:])
        steps[role], gradients[role] = jax.block_until_ready(
            _solve_stack(totals.gradients[role], a, g, jnp.float32(parts), own)
        )
    return steps, dataclasses.replace(totals, gradients=gradients)


@partial(jax.jit, static_argnames="rank")
def _solve_stack(
    gradients: jax.Array, a: jax.Array, g: jax.Array, parts: jax.Array, rank: int
) -> tuple[StackedFactors, jax.Array]:
    def one(item: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[StackedFactors, jax.Array]:
        gradient, inputs, outputs = (each / parts for each in item)
        b, a, rest = step_factors(gradient, inputs, outputs, rank)
        return StackedFactors(a=a, b=b), rest * parts

    # One layer after another on all devices: side by side the decompositions need many times the memory of the sums.
    return lax.map(one, (gradients, a, g))


def step_factors(gradient: jax.Array, a: jax.Array, g: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Minimise tr(S' dW) + tr(dW' G dW A) / 2 over updates dW of at most `rank`, with A and G damped.

    Without a limit on the rank that is dW = -G^-1 S A^-1. In coordinates in which A and G are the identity the
    quadratic form is a distance, so the best update of a given rank is that dW's truncated SVD there (Eckart-Young).
    The damping is relative to each dimension's own size and, behind that, to the mean eigenvalue: otherwise dimensions
    with massive activations would leave nothing of the others.

    Args:
        gradient: (O, I), the gradient S.
        a: (I, I), sum of x x'.
        g: (O, O), sum of s s'.
        rank: the highest rank of the update.

    Returns:
        b (O, rank) and a (rank, I), and the gradient of the quadratic model behind the step, S + G dW A (O, I).
    """
    (half_in, root_in), (half_out, root_out) = _roots(a, FLOOR_IN), _roots(g, FLOOR_OUT)
    u, s, vt = jnp.linalg.svd(dot(dot(half_out.T, gradient), half_in), full_matrices=False)
    u, vt = u[:, :rank] * s[:rank], vt[:rank]
    return -dot(half_out, u), dot(vt, half_in.T), gradient - dot(dot(root_out, u), dot(vt, root_in.T))


def _roots(moment: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
    """Return R with R R' the inverse of the damped moment M, and Q with Q Q' = M and R' Q the identity."""
    sizes = jnp.diagonal(moment)
    scale = jnp.sqrt(sizes + floor * jnp.median(sizes) + jnp.finfo(moment.dtype).tiny)
    values, vectors = jnp.linalg.eigh(moment / scale[:, None] / scale[None])
    damped = jnp.maximum(values, 0) + DAMPING * jnp.mean(jnp.maximum(values, 0)) + jnp.finfo(moment.dtype).eps
    return vectors / jnp.sqrt(damped) / scale[:, None], vectors * jnp.sqrt(damped) * scale[:, None]
