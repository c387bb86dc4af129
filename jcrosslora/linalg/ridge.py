"""Ridge regression of full and of reduced rank, from moments."""

import chex
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from jcrosslora.linalg.dot import dot


def ridge(gram: jax.Array, cross: jax.Array, penalty: float) -> jax.Array:
    """Find W (M, N) that minimises ||X W - Y||_F^2 + c ||W||_F^2, with c = penalty * mean(diag(X'X)).

    Args:
        gram: (M, M), X'X.
        cross: (M, N), X'Y.
        penalty: above 0.
    """
    return cho_solve((_damped_root(gram, penalty), True), cross)


def reduced_rank_ridge(gram: jax.Array, cross: jax.Array, rank: int, penalty: float) -> tuple[jax.Array, jax.Array]:
    """Find the minimiser of `ridge` of at most `rank` (Izenman 1975; with a penalty, Mukherjee and Zhu 2011).

    With L L' = X'X + c I the objective is ||L'W - L^-1 X'Y||_F^2 plus a constant, so the best L'W of a given rank is
    the truncated SVD of L^-1 X'Y (Eckart-Young). Its right vectors V are the leading eigenvectors of the Gram matrix of
    L^-1 X'Y, and W = ridge(...) V V'. The Gram matrix squares the singular values: those below 3e-4 of the largest are
    lost in rounding, and with them 1e-7 of the explained sum of squares.

    Args:
        gram: (M, M), X'X.
        cross: (M, N), X'Y.
        rank: R, at most min(M, N).
        penalty: above 0.

    Returns:
        left (M, R) and right (N, R), orthonormal, with W = left right'.
    """
    chex.assert_rank([gram, cross], 2)
    root = _damped_root(gram, penalty)
    white = solve_triangular(root, cross, lower=True)
    _, vectors = jnp.linalg.eigh(dot(white.T, white))
    right = vectors[:, ::-1][:, :rank]
    return cho_solve((root, True), dot(cross, right)), right


def _damped_root(gram: jax.Array, penalty: float) -> jax.Array:
    """Return the lower Cholesky factor of gram + c I; c is the penalty itself if the gram is zero."""
    mean = jnp.mean(jnp.diagonal(gram))
    damping = penalty * jnp.where(mean > 0, mean, 1)
    return jnp.linalg.cholesky(gram + damping * jnp.eye(gram.shape[0], dtype=gram.dtype))
