"""SVDs in float64 for close singular values: refined from a float32 subspace, or by LAPACK on the host."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from jcrosslora.linalg.host import leading_eigenvectors, map_on_host
from jcrosslora.linalg.low_rank import array_module, dot
from jcrosslora.linalg.svd_kernels import Triplets, TruncatedSVD, gaps, truncate


def refine(w: jax.Array, svd: TruncatedSVD, rank: int, *, vectors: bool = True) -> TruncatedSVD:
    """Apply Rayleigh-Ritz in float64 in the span of R + guard triplets; do not call it under jit.

    float32 rounding mixes a vector with its neighbours in the spectrum and hardly with distant ones, so the span of the
    R + guard triplets contains the true vectors almost exactly. Products of that width with W in float64 and a small
    eigenproblem recover them (Parlett 1998, chapter 11); the residual shows the part outside the span. With more than
    half of all triplets, the whole eigenproblem is solved, which costs no more.

    `svd` and the result are decompositions of W (O, I) in float32 with K = R + guard triplets.
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
        # The eigenvectors resolve close neighbours, so float32 is enough from here on.
        scale = jnp.where(s[:columns] > 0, s[:columns], 1).astype(jnp.float32)
        long = dot(single, short) / scale
    else:
        s, short, long = _ritz(tall, short)
        short, long = short.astype(jnp.float32), long.astype(jnp.float32)
    # The residual of the vectors as stored, in float64: squares of small numbers may underflow in float32.
    back = dot(single.T, long).astype(jnp.float64) - short.astype(jnp.float64) * s[:columns]
    residual = jnp.linalg.norm(back, axis=0) / 2**0.5  # W v = s u holds by construction
    u, v = (long, short) if upright else (short, long)
    return _truncate_refined(Triplets(u, s, v, residual, jnp.sum(tall**2)), rank, vectors)


def _truncate_refined(found: Triplets, rank: int, vectors: bool) -> TruncatedSVD:
    """Apply `truncate` to singular values and residuals in float64; the fields are float32."""
    svd = truncate(found, rank, vectors)
    leak = _leak(found.s, found.residual, svd.numerical_rank, rank, vectors, min(len(found.u), len(found.v)))
    # The vectors are stored in float32, which bounds their accuracy.
    svd = dataclasses.replace(svd, error=leak + float(jnp.finfo(jnp.float32).eps))
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, svd)


def _ritz(tall: jax.Array, short: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return Ritz values s (K,) and vectors (M, K) and (N, K) of T (N, M) in the span of the columns of `short`."""
    # Random columns replace zero ones and pick up directions of W that the others miss.
    noise = jax.random.normal(jax.random.key(0), short.shape, jnp.float32) / short.shape[0] ** 0.5
    short = jnp.where(jnp.any(short != 0, axis=0), short, noise).astype(jnp.float64)
    long = dot(tall, short)
    # L L' = V'V corrects for columns that are orthonormal in float32 only.
    root = jnp.linalg.cholesky(dot(short.T, short))
    squares = solve_triangular(root, solve_triangular(root, dot(long.T, long), lower=True).T, lower=True)
    squares, rotation = jnp.linalg.eigh(squares)
    rotation = solve_triangular(root.T, rotation[:, ::-1])
    s = jnp.sqrt(jnp.maximum(squares[::-1], 0))
    return s, dot(short, rotation), dot(long, rotation / jnp.where(s > 0, s, 1))


def _leak(s: jax.Array, residual: jax.Array, count: jax.Array, rank: int, vectors: bool, width: int) -> jax.Array:
    """Estimate the error of vectors that are exact in their span: leakage out of it, and the rotation this causes.

    The residual r_i is orthogonal to the span. It rotates vector i by r_i over the distance to the singular values
    outside, which are at most the last one inside; it rotates neighbours i and j into each other by r_i r_j over both
    distances.
    """
    xp = array_module(s)
    inside = xp.arange(rank, dtype=xp.int32) < count
    residual = xp.where(inside, residual[:rank], 0)
    tiny = float(xp.finfo(s.dtype).tiny)
    # If the span is the whole space, only float64 rounding remains.
    outside = xp.maximum(s[:rank] - s[-1], tiny)
    leak = xp.zeros_like(residual) if s.shape[0] == width else residual / outside
    apart = gaps(xp.append(s, xp.zeros(1, dtype=s.dtype)), rank, count, rank == width, vectors)
    turned = (xp.max(leak) * residual + float(xp.finfo(s.dtype).eps) * s[0]) / apart
    worst = xp.max(xp.where(inside, leak + turned, 0))
    return xp.where(xp.isfinite(s[0]), worst, xp.nan)


def gram_on_host(rows: Sequence[np.ndarray], rank: int, *, vectors: bool = True) -> list[TruncatedSVD]:
    """Compute the leading R triplets of each matrix from the Gram matrix of its short side, in float64.

    XLA on a CPU would run the matrices of a stack one by one, because LAPACK calls in several of its threads can
    deadlock. numpy releases the GIL in products, and `leading_eigenvectors` in LAPACK, so Python threads use all cores,
    and nothing is compiled. On a CPU float64 costs less than redoing the matrices for which float32 is too coarse.

    `rows` are float32 matrices (O, I) of one shape; the results are float32 numpy arrays, with the vectors of all
    matrices in one array. Vectors are accurate to float32 unless their neighbours in the spectrum are too close for
    float64; singular values below 1e-7 of the largest are lost. `error` shows both, and is NaN if W is not finite.
    """
    u, v = (np.empty((len(rows), size, rank), np.float32) for size in rows[0].shape)
    return list(map_on_host(partial(_solve, vectors=vectors), list(zip(rows, u, v, strict=True))))


def _solve(matrix: tuple[np.ndarray, np.ndarray, np.ndarray], *, vectors: bool) -> TruncatedSVD:
    """Decompose W (O, I); write its vectors to the given arrays (O, R) and (I, R)."""
    w, u, v = matrix
    upright = w.shape[0] >= w.shape[1]
    single, long, short = (w, u, v) if upright else (w.T, v, u)
    tall, rank = single.astype(np.float64), short.shape[1]  # float64 holds the squares of any float32
    with np.errstate(all="ignore"):  # `error` is NaN for values that are not finite
        gram = tall.T @ tall
        total, size = np.trace(gram), np.linalg.norm(gram)
        squares, leading = _leading(gram, rank)
        short[...] = leading.T
        s = np.sqrt(np.maximum(squares, 0))
        kept = np.where(s[:rank] > 0, s[:rank], 1)
        # The eigenvectors resolve close neighbours, so float32 is enough from here on.
        np.matmul(single, short, out=long)
        long /= kept.astype(np.float32)
        # W v = s u holds by construction. The other residual is the rounding of v, multiplied by W'W and divided by s.
        residual = 4 * float(np.finfo(np.float32).eps) * size / len(gram) ** 0.5 / kept
        return _truncate_refined(Triplets(u, s, v, residual, total), rank, vectors)  # type: ignore[arg-type]


def _leading(gram: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues, descending, and eigenvectors; all NaN if W is not finite or LAPACK does not converge."""
    try:
        if np.isfinite(gram).all():
            return leading_eigenvectors(gram, count)
    except np.linalg.LinAlgError:
        pass  # no convergence: `decompose` tries a stronger kernel
    return np.full(len(gram), np.nan), np.full((count, len(gram)), np.nan, np.float32)
