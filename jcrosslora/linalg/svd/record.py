"""What every SVD kernel returns, and how its own error is judged."""

import flax.struct
import jax
import jax.numpy as jnp


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
    columns, short = u.shape[1], min(u.shape[0], v.shape[0])
    # With where, and not a product: LAPACK may leave NaN in directions of zero singular value.
    keep = s[:columns] > noise_level((u.shape[0], v.shape[0])) * s[0]
    count = jnp.sum(keep[:rank]).astype(jnp.int32)
    kept = jnp.where(keep, s[:columns], 0)
    padded = jnp.append(s, jnp.zeros(1, s.dtype))
    last, after = s[jnp.maximum(count - 1, 0)], padded[count]
    safe_last = jnp.where(last > 0, last, 1)
    safe_top = jnp.where(s[0] > 0, s[0], 1)
    return TruncatedSVD(
        u=jnp.where(keep, u, 0),
        s=kept,
        v=jnp.where(keep, v, 0),
        residual=jnp.where(keep, residual, 0) / safe_top,
        energy=jnp.minimum(jnp.sum(kept[:rank] ** 2) / jnp.where(total > 0, total, 1), 1),
        gap=jnp.where(last > 0, (last - jnp.minimum(after, last)) / safe_last, 0),
        condition=jnp.where(last > 0, s[0] / safe_last, 0),
        error=_turn(padded, jnp.where(keep, residual, 0)[:rank], count, rank == short, vectors),
        numerical_rank=count,
    )


def _turn(s: jax.Array, residual: jax.Array, count: jax.Array, whole: bool, vectors: bool) -> jax.Array:
    """The largest angle of `truncate`, from s (S + 1,) that ends in a zero and the residuals (R,)."""
    rank = residual.shape[0]
    residual = jnp.maximum(residual, float(jnp.finfo(jnp.float32).eps) * s[0])
    below = s[:rank] - s[1 : rank + 1]
    if whole:
        # Nothing is cut off: the whole space is exact, and the last vector is fixed by the others.
        below = below.at[-1].set(jnp.inf)
    if vectors:
        above = jnp.append(jnp.full(1, jnp.inf, s.dtype), below[:-1])
        gaps = jnp.minimum(below, above)
    else:
        gaps = jnp.broadcast_to(below[jnp.maximum(count - 1, 0)], below.shape)
    angles = residual / jnp.maximum(gaps, float(jnp.finfo(s.dtype).tiny))
    worst = jnp.max(jnp.where(jnp.arange(rank, dtype=jnp.int32) < count, angles, 0))
    # NaN compares as below the noise, which would blank all directions and leave no error at all.
    return jnp.where(jnp.isfinite(s[0]), worst, jnp.nan)
