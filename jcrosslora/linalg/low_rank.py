"""Products at full precision, and low-rank maps in factored form: norms, approximations, least squares."""

from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def array_module(x: jax.Array | np.ndarray) -> Any:
    """Return numpy for a numpy array, so that nothing is compiled, else jax.numpy."""
    return np if isinstance(x, np.ndarray) else jnp


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply `a @ b` at full float32 precision.

    The defaults are TF32 on a GPU and bfloat16 passes on a TPU. One product at that precision rotates singular vectors
    by more than the gaps in the spectrum allow, so the precision is always explicit. Two numpy arrays are multiplied by
    numpy.
    """
    if array_module(a) is np and array_module(b) is np:
        return a @ b
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@flax.struct.dataclass
class LinearMap:
    """P x = gain * x[index] + left @ (inner * (right' @ x)): a weighted selection of rows plus a low-rank term.

    Attributes:
        left: (M_tgt, R); right is (M_src, R). R = 0 for a pure selection.
        inner: (R,), the weight of each pair of columns.
        index: (M_tgt,) int32, the source row of each target row.
        gain: (M_tgt,), the weight of that row; all zero for a purely low-rank map.
    """

    left: jax.Array
    right: jax.Array
    inner: jax.Array
    index: jax.Array
    gain: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the map to the columns of `x`, (M_src, K) -> (M_tgt, K)."""
        chex.assert_shape(x, (self.right.shape[0], None))
        return self.gain[:, None] * x[self.index] + dot(self.left, self.inner[:, None] * dot(self.right.T, x))


def low_rank(left: jax.Array, right: jax.Array, inner: jax.Array | None = None) -> LinearMap:
    """Return P = left @ diag(inner) @ right' for (M_tgt, R), (R,) and (M_src, R); `inner` defaults to ones."""
    xp, (rows, rank) = array_module(left), left.shape
    weights = xp.ones(rank, left.dtype) if inner is None else inner
    return LinearMap(left, right, weights, xp.zeros(rows, xp.int32), xp.zeros(rows, left.dtype))


def select(index: jax.Array, gain: jax.Array, size: int) -> LinearMap:
    """Return P with P x = gain * x[index], for x with `size` rows."""
    left, right = (jnp.zeros((rows, 0), gain.dtype) for rows in (index.shape[0], size))
    return LinearMap(left, right, jnp.ones(0, gain.dtype), index.astype(jnp.int32), gain)


def complement(first: jax.Array, second: jax.Array) -> LinearMap:
    """Return P = (I - F F')(I - S S') for orthonormal F and S, both (M, R).

    Expanded, P = I - F F' - (S - F F' S) S': the identity plus a term of rank 2 R.
    """
    chex.assert_equal_shape([first, second])
    rest = second - dot(first, dot(first.T, second))
    xp, rows = array_module(first), first.shape[0]
    return LinearMap(
        left=-xp.concatenate([first, rest], axis=1),
        right=xp.concatenate([first, second], axis=1),
        inner=xp.ones(2 * first.shape[1], first.dtype),
        index=xp.arange(rows, dtype=xp.int32),
        gain=xp.ones(rows, first.dtype),
    )


def product_energy(b: jax.Array, a: jax.Array) -> jax.Array:
    """Return ||B A||_F^2 = tr(B'B A A') for b (O, K) and a (K, I), from two Gram matrices (K, K)."""
    chex.assert_equal(b.shape[1], a.shape[0])
    return array_module(b).sum(dot(b.T, b) * dot(a, a.T))


def cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cosine of two matrices as vectors; 0 if one of them is zero."""
    xp = array_module(x)
    norms = xp.linalg.norm(x) * xp.linalg.norm(y)
    return xp.sum(x * y) / xp.where(norms > 0, norms, 1)


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
