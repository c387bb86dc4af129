"""The full SVD: slow, and limited by nothing but float32."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.dot import dot
from jcrosslora.linalg.svd.record import TruncatedSVD, truncate


def full_svd(w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0) -> TruncatedSVD:
    """The leading triplets of W (O, I) by a full SVD (LAPACK's gesdd on a CPU), cut afterwards.

    Args:
        w: (O, I), float32.
        rank: R, at most min(O, I).
        vectors: whether `error` is about single vectors (True) or only about the subspace at the cut.
        guard: how many further triplets to return, as far as there are any.
    """
    chex.assert_rank(w, 2)
    columns = min(rank + guard, *w.shape)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    u, v = u[:, :columns], vt[:columns].T
    sides = dot(w, v) - u * s[:columns], dot(w.T, u) - v * s[:columns]
    residual = jnp.linalg.norm(jnp.concatenate(sides), axis=0) / 2**0.5
    return truncate(u, s, v, residual, jnp.sum(s**2), rank=rank, vectors=vectors)
