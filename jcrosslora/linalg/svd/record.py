"""What every SVD kernel returns, and how its own error is judged."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class TruncatedSVD:
    """W ~ U diag(s) V', the leading R singular triplets of W (O, I).

    Directions of zero singular value (below the numerical rank) carry zero vectors: they are not part of the row
    or column space of W, and LAPACK's choice among them is arbitrary. A kernel that was asked for guard triplets
    returns R + guard of them; the scalars are about the first R.

    Attributes:
        u: (O, R), orthonormal columns.
        s: (R,), descending.
        v: (I, R), orthonormal columns.
        residual: (R,), root mean square of ||W v - s u|| and ||W'u - s v||, over s_1.
        energy: (), share of ||W||_F^2 in the R triplets.
        gap: (), (s_R - s_{R+1}) / s_R: how well the cut separates the subspace from the rest, 1 where nothing
            is cut off.
        condition: (), s_1 / s_R over the numerical rank.
        error: (), estimated error (radians, first order) of the worst of what was asked for: of a single vector,
            or of the whole subspace. Infinite where it cannot be had, NaN where W is not finite.
        numerical_rank: (), int32, how many of the R singular values are above float32 noise.
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
    """The functions for arrays of this kind: JAX's, or numpy's on the host, where nothing has to be compiled."""
    return np if isinstance(x, np.ndarray) else jnp


def noise_level(shape: tuple[int, ...]) -> float:
    """The level, relative to the largest, below which a singular value of a float32 matrix is rounding."""
    return float(jnp.finfo(jnp.float32).eps) * max(shape)


def truncate(
    u: jax.Array,
    s: jax.Array,
    v: jax.Array,
    residual: jax.Array,
    total: jax.Array,
    *,
    rank: int,
    vectors: bool,
) -> TruncatedSVD:
    """Make the record: blank the directions below the noise, and turn residuals into an error by the gaps.

    With [u; v] / sqrt(2) as eigenvector of [0 W; W' 0], a triplet of residual r is turned by at most r over its
    distance to the next singular value (Davis and Kahan 1970, Wedin 1972). Residuals below float32's rounding of s_1
    count as that: the stored vectors are no better.

    Args:
        u: (O, K), K of rank or more.
        s: (S,), all singular values that are known, descending; S of K or more.
        v: (I, K).
        residual: (K,), as in the record but not divided by s_1.
        total: (), ||W||_F^2.
        rank: R.
        vectors: whether `error` is about single vectors or only about the subspace at the cut.
    """
    keep, judged = judge(s, residual, total, (u.shape[0], v.shape[0]), rank=rank, vectors=vectors)
    return TruncatedSVD(u=jnp.where(keep, u, 0), v=jnp.where(keep, v, 0), **judged)


def judge(
    s: jax.Array, residual: jax.Array, total: jax.Array, shape: tuple[int, int], *, rank: int, vectors: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Which of K directions (K,) are above the noise, and all fields of the record but the vectors.

    Args:
        s: as in `truncate`.
        residual: as in `truncate`.
        total: as in `truncate`.
        shape: (O, I) of W.
        rank: R.
        vectors: as in `truncate`.
    """
    xp, columns, short = namespace(s), residual.shape[0], min(shape)
    # With where, and not a product: LAPACK may leave NaN in directions of zero singular value.
    keep = s[:columns] > noise_level(shape) * s[0]
    count = xp.sum(keep[:rank], dtype=xp.int32)
    kept = xp.where(keep, s[:columns], 0)
    padded = xp.append(s, xp.zeros(1, dtype=s.dtype))
    last, after = s[xp.maximum(count - 1, 0)], padded[count]
    safe_last = xp.where(last > 0, last, 1)
    safe_top = xp.where(s[0] > 0, s[0], 1)
    return keep, {
        "s": kept,
        "residual": xp.where(keep, residual, 0) / safe_top,
        "energy": xp.minimum(xp.sum(kept[:rank] ** 2) / xp.where(total > 0, total, 1), 1),
        "gap": xp.where(last > 0, (last - xp.minimum(after, last)) / safe_last, 0),
        "condition": xp.where(last > 0, s[0] / safe_last, 0),
        "error": _turn(padded, xp.where(keep, residual, 0)[:rank], count, rank == short, vectors),
        "numerical_rank": count,
    }


def _turn(s: jax.Array, residual: jax.Array, count: jax.Array, whole: bool, vectors: bool) -> jax.Array:
    """The largest angle of `truncate`, from s (S + 1,) that ends in a zero and the residuals (R,)."""
    xp, rank = namespace(s), residual.shape[0]
    residual = xp.maximum(residual, float(xp.finfo(xp.float32).eps) * s[0])
    below = s[:rank] - s[1 : rank + 1]
    if whole:
        # Nothing is cut off: the whole space is exact, and the last vector is fixed by the others.
        below = xp.append(below[:-1], xp.full(1, xp.inf, dtype=s.dtype))
    if vectors:
        above = xp.append(xp.full(1, xp.inf, dtype=s.dtype), below[:-1])
        gaps = xp.minimum(below, above)
    else:
        gaps = xp.broadcast_to(below[xp.maximum(count - 1, 0)], below.shape)
    angles = residual / xp.maximum(gaps, float(xp.finfo(s.dtype).tiny))
    worst = xp.max(xp.where(xp.arange(rank, dtype=xp.int32) < count, angles, 0))
    # NaN compares as below the noise, which would blank all directions and leave no error at all.
    return xp.where(xp.isfinite(s[0]), worst, xp.nan)
