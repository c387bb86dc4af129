"""The result of every SVD kernel, and the estimate of its error."""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class TruncatedSVD:
    """W ~ U diag(s) V', the leading R singular triplets of W (O, I).

    Vectors of zero singular values (beyond the numerical rank) are zero: they are not part of the row or column space
    of W, and LAPACK's choice of them is arbitrary. With guard triplets there are R + guard; the scalars are about the
    first R.

    Attributes:
        u: (O, R), orthonormal columns.
        s: (R,), descending.
        v: (I, R), orthonormal columns.
        residual: (R,), root mean square of ||W v - s u|| and ||W'u - s v||, over s_1.
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


def namespace(x: jax.Array) -> Any:
    """Return numpy for an array on the host, for which nothing is compiled, else jax.numpy."""
    return np if isinstance(x, np.ndarray) else jnp


def noise_level(shape: tuple[int, ...]) -> float:
    """Return the level, relative to the largest, below which a singular value of a float32 matrix is rounding."""
    return float(jnp.finfo(jnp.float32).eps) * max(shape)


class Triplets(NamedTuple):
    """Triplets of W (O, I) as a kernel found them, jax or numpy arrays.

    Attributes:
        u: (O, K), K >= R.
        s: (S,), all known singular values, descending; S >= K.
        v: (I, K).
        residual: (K,), as in `TruncatedSVD`, but not divided by s_1.
        total: (), ||W||_F^2.
    """

    u: jax.Array
    s: jax.Array
    v: jax.Array
    residual: jax.Array
    total: jax.Array


def truncate(found: Triplets, rank: int, vectors: bool) -> TruncatedSVD:
    """Build the record: zero the vectors below the noise, and estimate `error` from residuals and gaps.

    With [u; v] / sqrt(2) as an eigenvector of [0 W; W' 0], a triplet of residual r is rotated by at most r over its
    distance to the next singular value (Davis and Kahan 1970, Wedin 1972). Residuals are raised to at least the float32
    rounding of s_1, because the vectors are stored in float32.

    Args:
        found: of W.
        rank: R.
        vectors: whether `error` is about individual vectors (True) or about the subspace at the cut.
    """
    xp, s, columns, shape = namespace(found.s), found.s, found.residual.shape[0], (len(found.u), len(found.v))
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
        u=xp.where(keep, found.u, xp.zeros_like(found.u)),
        s=kept,
        v=xp.where(keep, found.v, xp.zeros_like(found.v)),
        residual=xp.where(keep, found.residual, 0) / safe_top,
        energy=xp.minimum(xp.sum(kept[:rank] ** 2) / total, 1),
        gap=xp.where(last > 0, (last - xp.minimum(after, last)) / safe_last, 0),
        condition=xp.where(last > 0, s[0] / safe_last, 0),
        error=_turn(padded, xp.where(keep, found.residual, 0)[:rank], count, rank == min(shape), vectors),
        numerical_rank=count,
    )


def _turn(s: jax.Array, residual: jax.Array, count: jax.Array, whole: bool, vectors: bool) -> jax.Array:
    """Return the largest angle of `truncate`, from s (S + 1,), ending in a zero, and residuals (R,)."""
    xp, rank = namespace(s), residual.shape[0]
    residual = xp.maximum(residual, float(xp.finfo(xp.float32).eps) * s[0])
    below = s[:rank] - s[1 : rank + 1]
    if whole:
        # Nothing is cut off: the subspace is the whole space, and the other vectors determine the last one.
        below = xp.append(below[:-1], xp.full(1, xp.inf, dtype=s.dtype))
    if vectors:
        above = xp.append(xp.full(1, xp.inf, dtype=s.dtype), below[:-1])
        gaps = xp.minimum(below, above)
    else:
        gaps = xp.broadcast_to(below[xp.maximum(count - 1, 0)], below.shape)
    angles = residual / xp.maximum(gaps, float(xp.finfo(s.dtype).tiny))
    worst = xp.max(xp.where(xp.arange(rank, dtype=xp.int32) < count, angles, 0))
    # NaN compares as below the noise, so all vectors would be zero, with an error of 0.
    return xp.where(xp.isfinite(s[0]), worst, xp.nan)
