"""SVD kernels, `kernel(w, rank, *, vectors=True, guard=0) -> TruncatedSVD` for one float32 matrix, and their result.

`full_svd` is slow and exact up to float32 rounding. `gram_svd` uses the eigenvectors of the Gram matrix of the short
side: it is fast, but squares the condition number. `krylov_svd` finds a few leading triplets in a subspace a few times
as wide as the rank.
"""

import dataclasses
import itertools
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jcrosslora.linalg.low_rank import array_module, dot

# From this width on, skipping the lower triangle saves more time than its copies take.
_TRIANGLE_FROM = 1024
_STRIPES = 4
# The last blocks restart from random columns. A block Krylov space holds a repeated eigenvalue at most as often as a
# block has columns; new random columns find the missing copies, whose residual then shows.
_PROBE_BLOCKS = 2
_FEWEST = 3
_LOOPS = 4
DEPTH, BLOCK = 4, 32


@flax.struct.dataclass
class TruncatedSVD:
    """W ~ U diag(s) V', the leading R singular triplets of W (O, I).

    Vectors of zero singular values (beyond the numerical rank) are zero: they are not part of the row or column space
    of W, and LAPACK's choice of them is arbitrary. With guard triplets there are R + guard; the scalars describe the
    first R.

    Attributes:
        u: (O, R), orthonormal columns, as in v (I, R); s (R,) is descending.
        residual: (R,), root mean square of ||W v - s u|| and ||W'u - s v||, over s_1; on the host an estimate of their
            float32 rounding.
        energy: (), share of ||W||_F^2 in the R triplets.
        gap: (), (s_R - s_{R+1}) / s_R, how well the cut separates the subspace; 1 if nothing is cut off.
        condition: (), s_1 / s_R within the numerical rank.
        error: (), estimated largest angle (radians, first order) between a computed and a true vector, or between the
            subspaces. Infinite if it cannot be estimated, NaN if W is not finite.
        numerical_rank: (), int32, number of the R singular values above float32 noise.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array
    residual: jax.Array
    energy: jax.Array
    gap: jax.Array
    condition: jax.Array
    error: jax.Array
    numerical_rank: jax.Array


class Triplets(NamedTuple):
    """K >= R triplets of W (O, I) as computed by a kernel, jax or numpy arrays.

    Attributes:
        s: (S,), all known singular values, descending; S >= K.
        residual: (K,), as in `TruncatedSVD`, but not divided by s_1.
        total: (), ||W||_F^2.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array
    residual: jax.Array
    total: jax.Array


def full_svd(w: jax.Array, rank: int, *, vectors: bool = True, guard: int = 0) -> TruncatedSVD:
    """Compute the leading triplets of W (O, I) by a full SVD (LAPACK's gesdd on a CPU) and truncation.

    Args:
        rank: R, at most min(O, I).
        vectors: whether `error` is about individual vectors (True) or about the subspace at the cut.
        guard: number of extra triplets to return, as far as there are any.
    """
    chex.assert_rank(w, 2)
    columns = min(rank + guard, *w.shape)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    u, v = u[:, :columns], vt[:columns].T
    sides = dot(w, v) - u * s[:columns], dot(w.T, u) - v * s[:columns]
    residual = jnp.linalg.norm(jnp.concatenate(sides), axis=0) / 2**0.5
    return truncate(Triplets(u, s, v, residual, jnp.sum(s**2)), rank, vectors)


def scale_out(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide W by its largest entry, so that squares stay in the range of float32; return both."""
    size = jnp.maximum(jnp.max(jnp.abs(w)), jnp.finfo(w.dtype).tiny)
    return w / size, size


def gram_matrix(w: jax.Array) -> jax.Array:
    """Return the smaller of W'W and WW', (M, M); for a large W compute only blocks on and above the diagonal."""
    # Both orientations are written out: XLA would copy a slice of a transpose, which takes longer than it saves.
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

    `eigenvalues` (S,) ascend, and `short` (M, S) has orthonormal columns.
    """
    scaled, size = scale_out(w)
    tall = scaled if w.shape[0] >= w.shape[1] else scaled.T
    columns = min(rank + guard, *w.shape)
    squares, short = jnp.maximum(eigenvalues[::-1], 0), short[:, -columns:][:, ::-1]
    s = jnp.sqrt(squares)
    long = dot(tall, short) / jnp.where(s[:columns] > 0, s[:columns], 1)
    # W v = s u holds by construction.
    residual = jnp.linalg.norm(dot(tall.T, long) - short * s[:columns], axis=0) / 2**0.5
    u, v = (long, short) if w.shape[0] >= w.shape[1] else (short, long)
    total = jnp.sum(jnp.sum(tall**2, axis=0))
    svd = truncate(Triplets(u, s, v, residual, total), rank, vectors)
    # The Gram matrix does not resolve squares below the noise, though W may have such singular values: the error is
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

    `depth` is the number of subspace columns per triplet, `block` the number of columns per block; see `full_svd` for
    the other arguments. With a depth of 3, vectors next to the cut do not converge on spectra that decay as slowly as
    those of language models.
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
    # A few loops of growing width: one loop of full width would multiply empty columns, and unrolling all blocks would
    # take longer to compile than to run.
    edges = sorted({1, *(max(1, count * i // _LOOPS) for i in range(1, _LOOPS + 1))})
    for start, stop in itertools.pairwise(edges):
        more = stop * block - basis.shape[1]
        state = jnp.pad(basis, ((0, 0), (0, more))), jnp.pad(projected, ((0, more), (0, more)))
        basis, projected = lax.fori_loop(start, stop, extend, state)
    last = dot(basis.T, dot(gram, basis[:, -block:]))
    return basis, projected.at[:, -block:].set(last)


def truncate(found: Triplets, rank: int, vectors: bool) -> TruncatedSVD:
    """Build the record: zero the vectors below the noise, and estimate `error` from residuals and gaps.

    With [u; v] / sqrt(2) as an eigenvector of [0 W; W' 0], a triplet of residual r is rotated by at most r over its
    distance to the next singular value (Davis and Kahan 1970, Wedin 1972). Residuals are raised to at least the float32
    rounding of s_1, because the vectors are stored in float32.

    `vectors` says whether `error` is about individual vectors (True) or about the subspace at the cut.
    """
    xp, s, columns, shape = array_module(found.s), found.s, found.residual.shape[0], (len(found.u), len(found.v))
    # `where` and not a product: LAPACK may leave NaN in vectors of zero singular values.
    keep = s[:columns] > noise_level(shape) * s[0]
    count = xp.sum(keep[:rank], dtype=xp.int32)
    kept = xp.where(keep, s[:columns], 0)
    padded = xp.append(s, xp.zeros(1, dtype=s.dtype))
    last, after = s[xp.maximum(count - 1, 0)], padded[count]
    safe_last = xp.where(last > 0, last, 1)
    safe_top = xp.where(s[0] > 0, s[0], 1)
    total = xp.where(found.total > 0, found.total, 1)
    return TruncatedSVD(
        u=_where(keep, found.u),
        s=kept,
        v=_where(keep, found.v),
        residual=xp.where(keep, found.residual, 0) / safe_top,
        energy=xp.minimum(xp.sum(kept[:rank] ** 2) / total, 1),
        gap=xp.where(last > 0, (last - xp.minimum(after, last)) / safe_last, 0),
        condition=xp.where(last > 0, s[0] / safe_last, 0),
        error=_turn(padded, xp.where(keep, found.residual, 0)[:rank], count, rank == min(shape), vectors),
        numerical_rank=count,
    )


def _where(keep: jax.Array, vectors: jax.Array) -> jax.Array:
    """Zero the vectors that are not kept; on the host, avoid the copy if all are kept."""
    xp = array_module(vectors)
    return vectors if xp is np and np.all(keep) else xp.where(keep, vectors, xp.zeros_like(vectors))


def _turn(s: jax.Array, residual: jax.Array, count: jax.Array, whole: bool, vectors: bool) -> jax.Array:
    """Return the `error` of `truncate` from s (S + 1,), which ends in a zero, and residuals (R,)."""
    xp, rank = array_module(s), residual.shape[0]
    residual = xp.maximum(residual, float(xp.finfo(xp.float32).eps) * s[0])
    angles = residual / gaps(s, rank, count, whole, vectors)
    worst = xp.max(xp.where(xp.arange(rank, dtype=xp.int32) < count, angles, 0))
    # NaN compares as below the noise, so all vectors would be zero, with an error of 0.
    return xp.where(xp.isfinite(s[0]), worst, xp.nan)


def gaps(s: jax.Array, rank: int, count: jax.Array, whole: bool, vectors: bool) -> jax.Array:
    """Return the distance (R,), above 0, of each singular value to its neighbours, or the gap at the cut for all.

    `s` (S + 1,) ends in a zero. If nothing is cut off (`whole`), the subspace is the whole space, and the other vectors
    determine the last one.
    """
    xp = array_module(s)
    far = xp.full(1, xp.inf, dtype=s.dtype)
    below = s[:rank] - s[1 : rank + 1]
    below = xp.append(below[:-1], far) if whole else below
    if vectors:
        found = xp.minimum(below, xp.append(far, below[:-1]))
    else:
        found = xp.broadcast_to(below[xp.maximum(count - 1, 0)], below.shape)
    return xp.maximum(found, float(xp.finfo(s.dtype).tiny))


def noise_level(shape: tuple[int, ...]) -> float:
    """Return the level, relative to the largest, below which singular values of a float32 matrix are noise."""
    return float(jnp.finfo(jnp.float32).eps) * max(shape)
