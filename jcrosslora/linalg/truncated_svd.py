"""Truncated SVD with the individual singular vectors exact, and a statement of how exact.

Two routes. `gram_svd` takes the eigenvectors of the short side's Gram matrix: fast, but it squares the condition,
so a vector whose neighbours in the spectrum are close comes out turned. `full_svd` decomposes W itself and is
limited only by float32. `decompose` takes the first for a whole stack and redoes by the second the matrices whose
estimated error is above the tolerance.
"""

from functools import partial

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jcrosslora.linalg.dot import dot
from jcrosslora.linalg.stacked import mesh_of, over_layers


@flax.struct.dataclass
class TruncatedSVD:
    """W ~ U diag(s) V', the leading R singular triplets of W (O, I).

    Directions of zero singular value (below the numerical rank) carry zero vectors: they are not part of the row
    or column space of W, and LAPACK's choice among them is arbitrary.

    Attributes:
        u: (O, R), orthonormal columns.
        s: (R,), descending.
        v: (I, R), orthonormal columns.
        energy: (), share of ||W||_F^2 in the R triplets.
        gap: (), (s_R - s_{R+1}) / s_R: how well the cut separates the subspace from the rest, 1 where nothing
            is cut off.
        condition: (), s_1 / s_R over the numerical rank.
        error: (), estimated error (radians, first order) of the worst of what was asked for: of a single vector,
            or of the whole subspace.
        numerical_rank: (), int32, how many of the R singular values are above float32 noise.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array
    energy: jax.Array
    gap: jax.Array
    condition: jax.Array
    error: jax.Array
    numerical_rank: jax.Array


def full_svd(w: jax.Array, rank: int, *, vectors: bool = True) -> TruncatedSVD:
    """The leading `rank` triplets of W (O, I) by a full SVD in float32.

    Args:
        w: (O, I), float32.
        rank: R, at most min(O, I).
        vectors: whether `error` is about single vectors (True) or only about the subspace at the cut.
    """
    chex.assert_rank(w, 2)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    # The backward error of a float32 SVD is a small multiple of eps * s_1, and a vector turns by that over its gap.
    error = _turn(s, rank, vectors, _noise(w) * s[0])
    return _truncate(u, s, vt.T, rank, error)


def gram_svd(w: jax.Array, rank: int, *, vectors: bool = True) -> TruncatedSVD:
    """The same through the eigenvectors of W'W or WW', whichever is smaller; arguments as in `full_svd`."""
    chex.assert_rank(w, 2)
    tall = w.shape[0] >= w.shape[1]
    w_tall = w if tall else w.T
    # A common factor keeps the squares in W'W inside float32's range.
    size = jnp.maximum(jnp.max(jnp.abs(w)), jnp.finfo(w.dtype).tiny)
    w_tall = w_tall / size
    eigenvalues, short = jnp.linalg.eigh(dot(w_tall.T, w_tall))
    s_squared = jnp.maximum(eigenvalues[::-1], 0)
    short = short[:, ::-1]
    s = jnp.sqrt(s_squared)
    # The same first-order bound, on the squared spectrum: eps * s_1^2 over the gap of the squares. Squares below
    # the noise are not told apart from zero here, though W itself may still hold them: then only W can answer.
    noise = _noise(w) * s_squared[0]
    error = jnp.where(s_squared[rank - 1] > noise, _turn(s_squared, rank, vectors, noise), jnp.inf)
    long = dot(w_tall, short[:, :rank]) / jnp.where(s[:rank] > 0, s[:rank], 1)
    u, v = (long, short) if tall else (short, long)
    return _truncate(u, s * size, v, rank, error)


def decompose(
    stack: jax.Array, rank: int, *, vectors: bool = True, tolerance: float = 1e-2
) -> tuple[TruncatedSVD, int]:
    """Truncated SVD of a stack of matrices, each as exact as asked for or as float32 allows.

    Args:
        stack: (L, O, I), float32; may be sharded over L.
        rank: R, at most min(O, I).
        vectors: whether single vectors matter, or only the subspace that they span.
        tolerance: largest `error` accepted from the Gram matrix; above it a matrix is redone by a full SVD.

    Returns:
        The decomposition with a leading axis L on every field, and how many matrices were redone.
    """
    chex.assert_rank(stack, 3)
    svd = _stack_by_gram(stack, rank, vectors, mesh_of(stack))
    redo = np.flatnonzero(~(np.asarray(svd.error) <= tolerance))  # "not <=" so that a NaN is redone too
    if len(redo):
        better = [_one_in_full(_row(stack, int(row)), rank, vectors) for row in redo]
        svd = _replace_rows(svd, jnp.asarray(redo), jax.tree.map(lambda *rows: jnp.stack(rows), *better))
    return svd, len(redo)


@jax.jit
def _replace_rows(svd: TruncatedSVD, rows: jax.Array, better: TruncatedSVD) -> TruncatedSVD:
    return jax.tree.map(lambda whole, part: whole.at[rows].set(part), svd, better)


@partial(jax.jit, static_argnames=("rank", "vectors", "mesh"))
def _stack_by_gram(stack: jax.Array, rank: int, vectors: bool, mesh: Mesh | None) -> TruncatedSVD:
    return over_layers(lambda w, _: gram_svd(w, rank, vectors=vectors), mesh, stack)


@partial(jax.jit, static_argnames=("rank", "vectors"))
def _one_in_full(w: jax.Array, rank: int, vectors: bool) -> TruncatedSVD:
    return full_svd(w, rank, vectors=vectors)


def _row(stack: jax.Array, row: int) -> np.ndarray:
    """One matrix of a stack, from the device that holds it, without moving the others."""
    for shard in stack.addressable_shards:
        first, stop, _ = shard.index[0].indices(stack.shape[0])
        if first <= row < stop:
            return np.asarray(shard.data[row - first])
    msg = f"row {row} of the stack is not on this host"
    raise AssertionError(msg)


def _noise(w: jax.Array) -> float:
    """The level, relative to the largest, below which a singular value of W is rounding."""
    return float(jnp.finfo(w.dtype).eps) * max(w.shape)


def _turn(spectrum: jax.Array, rank: int, vectors: bool, noise: jax.Array) -> jax.Array:
    """First-order angle by which rounding turns the worst vector (or the subspace): eps * top / gap."""
    gaps = spectrum[:rank] - jnp.append(spectrum[1:], 0.0)[:rank]
    # A direction below the noise is dropped by _truncate, so its gap does not matter.
    gaps = jnp.where(spectrum[:rank] > noise, gaps, jnp.inf)
    if spectrum.shape[0] == rank:
        # Nothing is cut off: the whole space is exact, and the last vector is fixed by the others.
        gaps = gaps.at[-1].set(jnp.inf)
    smallest = jnp.min(gaps) if vectors else gaps[-1]
    tiny = jnp.finfo(spectrum.dtype).tiny
    return jnp.finfo(spectrum.dtype).eps * spectrum[0] / jnp.maximum(smallest, tiny)


def _truncate(u: jax.Array, s: jax.Array, v: jax.Array, rank: int, error: jax.Array) -> TruncatedSVD:
    """Cut to `rank` and blank the directions below the noise (with where: LAPACK may leave NaN in them)."""
    keep = s[:rank] > jnp.finfo(s.dtype).eps * max(u.shape[0], v.shape[0]) * s[0]
    count = jnp.sum(keep).astype(jnp.int32)
    kept = jnp.where(keep, s[:rank], 0)
    last = s[jnp.maximum(count - 1, 0)]
    after = s[rank] if s.shape[0] > rank else jnp.zeros((), s.dtype)
    safe_last = jnp.where(last > 0, last, 1)
    total = jnp.sum(s**2)
    return TruncatedSVD(
        u=jnp.where(keep, u[:, :rank], 0),
        s=kept,
        v=jnp.where(keep, v[:, :rank], 0),
        energy=jnp.sum(kept**2) / jnp.where(total > 0, total, 1),
        gap=jnp.where(last > 0, (last - jnp.minimum(after, last)) / safe_last, 0),
        condition=jnp.where(last > 0, s[0] / safe_last, 0),
        error=error,
        numerical_rank=count,
    )
