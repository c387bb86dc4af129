"""The full SVD: slow, with an error of float32 rounding only."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.dot import dot
from jcrosslora.linalg.svd.record import TruncatedSVD, truncate


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
