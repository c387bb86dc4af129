"""SVD kernels that look at the whole matrix.

`full_svd` is slow, with an error of float32 rounding only. `gram_svd` takes the eigenvectors of the Gram matrix of the
short side: fast, but it squares the condition number.
"""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.dot import dot
from jcrosslora.linalg.svd.record import TruncatedSVD, noise_level, truncate


def full_svd(w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0) -> TruncatedSVD:
    """Compute the leading triplets of W (O, I) by a full SVD (LAPACK's gesdd on a CPU) and truncation.

    Args:
        w: (O, I), float32.
        rank: R, at most min(O, I).
        vectors: whether `error` is about individual vectors (True) or about the subspace at the cut.
        guard: number of further triplets to return, if there are as many.
    """
    chex.assert_rank(w, 2)
    columns = min(rank + guard, *w.shape)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    u, v = u[:, :columns], vt[:columns].T
    sides = dot(w, v) - u * s[:columns], dot(w.T, u) - v * s[:columns]
    residual = jnp.linalg.norm(jnp.concatenate(sides), axis=0) / 2**0.5
    return truncate(u, s, v, residual, jnp.sum(s**2), rank=rank, vectors=vectors)


# From this width on, skipping the lower triangle saves more time than its copies take.
_TRIANGLE_FROM = 1024
_STRIPES = 4


def scale_out(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide W by its largest entry, so that squares stay in the range of float32; return both."""
    size = jnp.maximum(jnp.max(jnp.abs(w)), jnp.finfo(w.dtype).tiny)
    return w / size, size


def gram_matrix(w: jax.Array) -> jax.Array:
    """Return W'W or WW' (M, M), the smaller one, of a large W by the blocks on and above the diagonal."""
    # Both orientations are written out: XLA copies a slice of a transpose, which takes longer than it saves.
    wide, width = w.shape[0] < w.shape[1], min(w.shape)
    if width < _TRIANGLE_FROM:
        return dot(w, w.T) if wide else dot(w.T, w)
    edges = [width * i // _STRIPES for i in range(_STRIPES + 1)]
    stripes = [
        jnp.pad(
            dot(w[start:stop], w[start:].T) if wide else dot(w[:, start:stop].T, w[:, start:]), ((0, 0), (start, 0))
        )
        for start, stop in itertools.pairwise(edges)
    ]
    upper = jnp.triu(jnp.concatenate(stripes))
    return upper + jnp.triu(upper, 1).T


def from_eigenpairs(
    w: jax.Array, eigenvalues: jax.Array, short: jax.Array, *, rank: int, vectors: bool, guard: int
) -> TruncatedSVD:
    """Compute triplets of W (O, I) from (approximate) eigenpairs of the Gram matrix of `scale_out(w)`.

    The long side is u = W v / s, so W v = s u holds by construction. The residual of the other equation is measured on
    W and includes the rounding of the Gram matrix and of its eigenvectors.

    Args:
        w: (O, I).
        eigenvalues: (S,), ascending.
        short: (M, S), orthonormal columns.
        rank: R.
        vectors: as in the kernels.
        guard: as in the kernels.
    """
    scaled, size = scale_out(w)
    tall = scaled if w.shape[0] >= w.shape[1] else scaled.T
    columns = min(rank + guard, *w.shape)
    squares, short = jnp.maximum(eigenvalues[::-1], 0), short[:, -columns:][:, ::-1]
    s = jnp.sqrt(squares)
    long = dot(tall, short) / jnp.where(s[:columns] > 0, s[:columns], 1)
    residual = (
        jnp.linalg.norm(dot(tall.T, long) - short * s[:columns], axis=0) / 2**0.5
    )  # W v = s u holds by construction
    u, v = (long, short) if w.shape[0] >= w.shape[1] else (short, long)
    total = jnp.sum(jnp.sum(tall**2, axis=0))
    svd = truncate(u, s, v, residual, total, rank=rank, vectors=vectors)
    # The Gram matrix does not resolve squares below the noise, though W may hold these singular values: the error is
    # unknown then. `~(a > b)` keeps a NaN error.
    lost = ~(squares[rank - 1] > noise_level(w.shape) * squares[0]) & jnp.isfinite(squares[0])
    return dataclasses.replace(svd, s=svd.s * size, error=jnp.where(lost, jnp.inf, svd.error))


def gram_svd(w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0) -> TruncatedSVD:
    """Compute the leading triplets of W (O, I) from W'W or WW', the smaller one; arguments as in `full_svd`.

    Vectors with close neighbours in the spectrum come out rotated, and singular values below 3e-4 of the largest are
    lost; `error` shows both.
    """
    chex.assert_rank(w, 2)
    eigenvalues, short = jnp.linalg.eigh(gram_matrix(scale_out(w)[0]))
    return from_eigenpairs(w, eigenvalues, short, rank=rank, vectors=vectors, guard=guard)
