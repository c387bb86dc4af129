"""SVD by the eigenvectors of the Gram matrix of the short side: fast, but it squares the condition number."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.svd.record import TruncatedSVD
from jcrosslora.linalg.svd.short_side import from_eigenpairs, gram_matrix, scale_out


def gram_svd(w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0) -> TruncatedSVD:
    """Compute the leading triplets of W (O, I) from W'W or WW', the smaller one; arguments as in `full_svd`.

    Vectors with close neighbours in the spectrum come out rotated, and singular values below 3e-4 of the largest are
    lost; `error` shows both.
    """
    chex.assert_rank(w, 2)
    eigenvalues, short = jnp.linalg.eigh(gram_matrix(scale_out(w)[0]))
    return from_eigenpairs(w, eigenvalues, short, rank=rank, vectors=vectors, guard=guard)
