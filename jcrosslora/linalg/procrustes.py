"""The orthogonal Procrustes problem, also between spaces of different width."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.linear_map import LinearMap, low_rank


def procrustes(cross: jax.Array) -> tuple[LinearMap, jax.Array]:
    """The partial isometry P that best carries the rows of X to those of Y, from their cross-moment alone.

    P maximises tr(P X'Y), and for equal widths minimises ||X P' - Y||_F over orthogonal P (Schoenemann 1966): with
    X'Y = U S V', P = V U'. Directions that the moment does not determine are mapped to zero: those whose singular value
    is below the rounding of float32, eps times the longer side times the largest. They are many where a few dimensions
    carry most of the energy, and their vectors are noise (on the one real pair measured, keeping them undid the gain).

    Args:
        cross: (M_src, M_tgt), X'Y.

    Returns:
        P (M_tgt, M_src), and the nuclear norm () of the moment, which is tr(P X'Y).
    """
    chex.assert_rank(cross, 2)
    u, s, vt = jnp.linalg.svd(cross, full_matrices=False)
    reached = s > jnp.finfo(s.dtype).eps * max(cross.shape) * s[0]
    return low_rank(jnp.where(reached, vt.T, 0), jnp.where(reached, u, 0)), jnp.sum(s)
