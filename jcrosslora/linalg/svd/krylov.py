"""SVD kernels for a few leading triplets: block Krylov, in a subspace a few times as wide as the rank.

Randomised subspace iteration, the usual method, is kept for comparison.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jcrosslora.linalg.dot import dot
from jcrosslora.linalg.svd.dense import from_eigenpairs, gram_matrix, gram_svd, scale_out
from jcrosslora.linalg.svd.record import TruncatedSVD

# The last blocks restart from random columns. A block Krylov space holds a repeated eigenvalue at most as often as a
# block has columns; new random columns find the missing copies, whose residual then shows.
_PROBE_BLOCKS = 2
_FEWEST = 3
_LOOPS = 4
DEPTH, BLOCK = 4, 32


def krylov_columns(rank: int, *, guard: int = 0, depth: int = DEPTH, block: int = BLOCK) -> int:
    """Return the width of the subspace of `krylov_svd`: `depth` times the rank in whole blocks, plus the probes.

    Convergence depends on the number of blocks, so a small rank gets `_FEWEST` blocks per unit of depth.
    """
    blocks = max(-(-depth * rank // block), -(-(rank + guard) // block), _FEWEST * depth)
    return (blocks + _PROBE_BLOCKS) * block


def krylov_svd(
    w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0, depth: int = DEPTH, block: int = BLOCK
) -> TruncatedSVD:
    """Compute the leading triplets of W (O, I) by block Lanczos on the Gram matrix (Golub and Underwood 1977).

    The Gram matrix is formed: two products with W per step are fewer operations for a square W, but took as long there
    and longer for other shapes. Each block is orthogonalised twice against all earlier blocks; Rayleigh-Ritz then takes
    the eigenvectors in the whole subspace. `error` does not assume convergence: it follows from `residual`, which is
    measured on W. If the subspace would be as wide as the matrix, `gram_svd` is used instead.

    Args:
        w: (O, I), float32.
        rank: R, at most min(O, I).
        vectors: whether `error` is about individual vectors (True) or about the subspace at the cut.
        guard: number of further triplets to return, if there are as many.
        depth: columns of the subspace per triplet. With 3, vectors next to the cut do not converge on spectra that
            decay as slowly as those of language models.
        block: columns per block.
    """
    chex.assert_rank(w, 2)
    columns = krylov_columns(rank, guard=guard, depth=depth, block=block)
    if columns >= min(w.shape):
        return gram_svd(w, rank, vectors=vectors, guard=guard)
    basis, projected = _basis(gram_matrix(scale_out(w)[0]), columns // block, block)
    upper = jnp.triu(projected)
    values, inside = jnp.linalg.eigh(upper + jnp.triu(upper, 1).T)
    short = dot(basis, inside[:, -(rank + guard) :])
    return from_eigenpairs(w, values, short, rank=rank, vectors=vectors, guard=guard)


def _basis(gram: jax.Array, count: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Return an orthonormal basis Q (M, count * block) of the Krylov space of G, and the upper triangle of Q'G Q."""

    def orthonormal(new: jax.Array, basis: jax.Array) -> jax.Array:
        new, _ = jnp.linalg.qr(new)
        new, _ = jnp.linalg.qr(new - dot(basis, dot(basis.T, new)))
        return new

    def extend(j: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        basis, projected = state
        image = dot(gram, lax.dynamic_slice_in_dim(basis, (j - 1) * block, block, axis=1))
        inside = dot(basis.T, image)
        projected = lax.dynamic_update_slice_in_dim(projected, inside, (j - 1) * block, axis=1)
        noise = jax.random.normal(jax.random.fold_in(key, j), (width, block), basis.dtype)
        # Random columns of the size of rounding keep a block from being singular: if the space is already invariant
        # (low rank, equal singular values, zero), the next block lies outside it, and nothing is divided by zero.
        rounding = 10 * float(jnp.finfo(basis.dtype).eps) * jnp.maximum(jnp.linalg.norm(image), 1) / width**0.5
        new = jnp.where(j == count - _PROBE_BLOCKS, noise, image - dot(basis, inside) + rounding * noise)
        new = orthonormal(new, basis)
        return lax.dynamic_update_slice_in_dim(basis, new, j * block, axis=1), projected

    key, width = jax.random.key(0), gram.shape[0]
    basis, _ = jnp.linalg.qr(jax.random.normal(key, (width, block), gram.dtype))
    projected = jnp.zeros((block, block), basis.dtype)
    # A few loops of growing width: one loop of full width would multiply empty columns, and one program per block would
    # take longer to compile than to run.
    edges = sorted({1, *(max(1, count * i // _LOOPS) for i in range(1, _LOOPS + 1))})
    for start, stop in itertools.pairwise(edges):
        more = stop * block - basis.shape[1]
        state = jnp.pad(basis, ((0, 0), (0, more))), jnp.pad(projected, ((0, more), (0, more)))
        basis, projected = lax.fori_loop(start, stop, extend, state)
    last = dot(basis.T, dot(gram, basis[:, -block:]))
    return basis, projected.at[:, -block:].set(last)


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
