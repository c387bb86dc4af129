"""Maps between two spaces: orthogonal Procrustes, matrix powers, and the sizes of dimensions."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.low_rank import LinearMap, dot, low_rank


def procrustes(cross: jax.Array) -> tuple[LinearMap, jax.Array]:
    """Find the partial isometry P that best maps the rows of X to those of Y, from X'Y (M_src, M_tgt).

    P maximises tr(P X'Y), and for equal widths minimises ||X P' - Y||_F over orthogonal P (Schoenemann 1966): with
    X'Y = U S V', P = V U'. Directions that the moment does not determine are mapped to zero: those whose singular value
    is below float32 rounding, eps times the longer side times the largest. There are many of them when a few dimensions
    carry most of the energy, and their vectors are noise (on the one real pair measured, keeping them undid the gain).

    Returns:
        P (M_tgt, M_src), and the nuclear norm () of the moment, equal to tr(P X'Y).
    """
    chex.assert_rank(cross, 2)
    u, s, vt = jnp.linalg.svd(cross, full_matrices=False)
    reached = s > jnp.finfo(s.dtype).eps * max(cross.shape) * s[0]
    return low_rank(jnp.where(reached, vt.T, 0), jnp.where(reached, u, 0)), jnp.sum(s)


def psd_power(matrix: jax.Array, power: float) -> tuple[jax.Array, jax.Array]:
    """Compute a power of a matrix (M, M) by eigenvectors, with eigenvalues raised to the level of float32 rounding.

    An eigenvalue below eps times the side times the largest is noise and may be negative; its negative power would
    outweigh all others.

    Returns:
        The power (M, M), and the eigenvalues (M,) after raising, ascending.
    """
    chex.assert_rank(matrix, 2)
    values, vectors = jnp.linalg.eigh(matrix)
    noise = jnp.finfo(values.dtype).eps * values.shape[0] * values[-1]
    values = jnp.maximum(values, jnp.where(noise > 0, noise, 1))
    return dot(vectors * values**power, vectors.T), values


# Share of the median size. A smaller dimension is dead or almost unused: divided by its own size, its few small values
# would weigh as much as a whole other dimension, and a map that divides by it would be unbounded.
FLOOR = 1e-2


def dimension_sizes(squares: jax.Array) -> jax.Array:
    """Return the root of each dimension's sum of squares (M,), at least `FLOOR` times the median.

    If more than half of the sizes are zero, the mean replaces the median; if all are, the sizes are ones.
    """
    chex.assert_rank(squares, 1)
    sizes = jnp.sqrt(squares)
    middle = jnp.median(sizes)
    middle = jnp.where(middle > 0, middle, jnp.mean(sizes))
    return jnp.where(middle > 0, jnp.maximum(sizes, FLOOR * middle), 1)
