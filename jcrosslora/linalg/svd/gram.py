"""The eigenvectors of the short side's Gram matrix: fast, but it squares the condition."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.svd.record import TruncatedSVD
from jcrosslora.linalg.svd.short_side import from_eigenpairs, gram_matrix, scale_out


def gram_svd(w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0) -> TruncatedSVD:
    """The leading triplets of W (O, I) through W'W or WW', whichever is smaller; arguments as in `full_svd`.

    A vector whose neighbours in the spectrum are close comes out turned, and singular values below 3e-4 of the
    largest are lost; `error` says so.
    """
    chex.assert_rank(w, 2)
    eigenvalues, short = jnp.linalg.eigh(gram_matrix(scale_out(w)[0]))
    return from_eigenpairs(w, eigenvalues, short, rank=rank, vectors=vectors, guard=guard)
