"""Single vectors in float64 from a subspace in float32, for matrices whose singular values lie too close."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from jcrosslora.linalg.dot import dot
from jcrosslora.linalg.svd.record import TruncatedSVD, judge, namespace


def refine(w: jax.Array, svd: TruncatedSVD, rank: int, *, vectors: bool = True) -> TruncatedSVD:
    """Rayleigh-Ritz in float64 within the space of R + guard triplets; not to be called under jit.

    Rounding in float32 mixes neighbours in the spectrum, and hardly anything with vectors that are far from it: the
    guard triplets keep the mixture inside. Each vector is sought anew there, from W in float64, which costs products
    of that width and a small eigenproblem, whatever the size of W (Parlett 1998, chapter 11). What is left of other
    directions shows in the residual. Where these triplets are more than half of all, the whole space is as cheap.

    Args:
        w: (O, I), float32.
        svd: of W, with K = R + guard triplets.
        rank: R.
        vectors: as in the kernels.

    Returns:
        The decomposition with K triplets, in float32.
    """
    chex.assert_rank([w, svd.u], 2)
    with jax.enable_x64(True):
        return _refine(w, svd.v if w.shape[0] >= w.shape[1] else svd.u, rank, vectors)


@partial(jax.jit, static_argnames=("rank", "vectors"))
def _refine(w: jax.Array, short: jax.Array, rank: int, vectors: bool) -> TruncatedSVD:
    upright = w.shape[0] >= w.shape[1]
    single = w if upright else w.T
    tall, columns, width = single.astype(jnp.float64), short.shape[1], single.shape[1]
    if 2 * columns > width:
        squares, short = jnp.linalg.eigh(dot(tall.T, tall))
        s = jnp.sqrt(jnp.maximum(squares[::-1], 0))
        short = short[:, -columns:][:, ::-1].astype(jnp.float32)
        # Neighbours are told apart by now, and float32 does for what is left.
        scale = jnp.where(s[:columns] > 0, s[:columns], 1).astype(jnp.float32)
        long = dot(single, short) / scale
    else:
        s, short, long = _ritz(tall, short)
        short, long = short.astype(jnp.float32), long.astype(jnp.float32)
    # Of the vectors as they are stored, and on the scale of W, where squares in float32 might vanish.
    back = dot(single.T, long).astype(jnp.float64) - short.astype(jnp.float64) * s[:columns]
    residual = jnp.linalg.norm(back, axis=0) / 2**0.5  # W v = s u holds
    keep, judged = judge_refined(s, residual, jnp.sum(tall**2), w.shape, rank, vectors)
    long, short = jnp.where(keep, long, 0), jnp.where(keep, short, 0)
    u, v = (long, short) if upright else (short, long)
    return TruncatedSVD(u=u, v=v, **judged)


def judge_refined(
    s: jax.Array, residual: jax.Array, total: jax.Array, shape: tuple[int, ...], rank: int, vectors: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As `judge`, of singular values and residuals in float64, with every field in float32."""
    keep, judged = judge(s, residual, total, (shape[0], shape[1]), rank=rank, vectors=vectors)
    # The vectors are stored in float32, and no surer than that.
    error = _leak(s, residual, judged["numerical_rank"], rank, vectors, min(shape)) + float(jnp.finfo(jnp.float32).eps)
    judged = {**judged, "error": error}
    return keep, {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in judged.items()}


def _ritz(tall: jax.Array, short: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ritz values s (K,), and both sides (M, K) and (N, K), of T (N, M) in the space of the columns of `short`."""
    # Blank columns give way to random ones: they get what W has beside the others.
    noise = jax.random.normal(jax.random.key(0), short.shape, jnp.float32) / short.shape[0] ** 0.5
    short = jnp.where(jnp.any(short != 0, axis=0), short, noise).astype(jnp.float64)
    long = dot(tall, short)
    # L L' = V'V makes up for columns that are orthonormal only in float32.
    root = jnp.linalg.cholesky(dot(short.T, short))
    squares = solve_triangular(root, solve_triangular(root, dot(long.T, long), lower=True).T, lower=True)
    squares, rotation = jnp.linalg.eigh(squares)
    rotation = solve_triangular(root.T, rotation[:, ::-1])
    s = jnp.sqrt(jnp.maximum(squares[::-1], 0))
    return s, dot(short, rotation), dot(long, rotation / jnp.where(s > 0, s, 1))


def _leak(s: jax.Array, residual: jax.Array, count: jax.Array, rank: int, vectors: bool, width: int) -> jax.Array:
    """The error of vectors that are exact within their space: what leaks out of it, and what that turns inside.

    The residual r_i is orthogonal to the space, so it is over the distance to what is outside, at most the last value
    inside, that it turns vector i; neighbours i and j are turned into each other by r_i r_j over both distances.
    """
    xp = namespace(s)
    inside = xp.arange(rank, dtype=xp.int32) < count
    residual = xp.where(inside, residual[:rank], 0)
    tiny = float(xp.finfo(s.dtype).tiny)
    below = s[:rank] - xp.append(s, xp.zeros(1, dtype=s.dtype))[1 : rank + 1]
    if s.shape[0] == width:
        # Nothing is outside; only float64 itself is left over.
        leak = xp.zeros_like(residual)
        below = xp.append(below[:-1], xp.full(1, xp.inf, dtype=s.dtype)) if rank == width else below
    else:
        leak = residual / xp.maximum(s[:rank] - s[-1], tiny)
    gaps = xp.minimum(below, xp.append(xp.full(1, xp.inf, dtype=s.dtype), below[:-1]))
    if not vectors:
        gaps = xp.broadcast_to(below[xp.maximum(count - 1, 0)], below.shape)
    turned = (xp.max(leak) * residual + float(xp.finfo(s.dtype).eps) * s[0]) / xp.maximum(gaps, tiny)
    worst = xp.max(xp.where(inside, leak + turned, 0))
    return xp.where(xp.isfinite(s[0]), worst, xp.nan)
