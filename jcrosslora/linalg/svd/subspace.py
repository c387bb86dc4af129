"""Randomised subspace iteration: the usual method for a few leading triplets, kept for comparison."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.dot import dot
from jcrosslora.linalg.svd.record import TruncatedSVD
from jcrosslora.linalg.svd.short_side import from_eigenpairs, gram_matrix, scale_out


def subspace_svd(
    w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0, extra: int | None = None, iterations: int = 8
) -> TruncatedSVD:
    """Compute the leading triplets of W (O, I) by subspace iteration (Halko, Martinsson and Tropp 2011).

    Each iteration gains a factor of (s_{R+extra} / s_R)^2, which is close to 1 for the slowly decaying spectra of
    language models: the subspace converges, individual vectors near the cut do not. `error` shows this.

    Args:
        w: (O, I), float32.
        rank: R, at most min(O, I).
        vectors: whether `error` is about individual vectors (True) or about the subspace at the cut.
        guard: number of further triplets to return, if there are as many.
        extra: columns beyond R; None is half of R.
        iterations: products with the Gram matrix.
    """
    chex.assert_rank(w, 2)
    gram = gram_matrix(scale_out(w)[0])
    columns = min(rank + max(guard, rank // 2 if extra is None else extra), *w.shape)
    basis = jax.random.normal(jax.random.key(0), (gram.shape[0], columns), w.dtype)
    for _ in range(iterations):
        basis, _ = jnp.linalg.qr(dot(gram, basis))
    values, rotation = jnp.linalg.eigh(dot(basis.T, dot(gram, basis)))
    return from_eigenpairs(w, values, dot(basis, rotation), rank=rank, vectors=vectors, guard=guard)
