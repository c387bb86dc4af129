"""Orthogonal Procrustes, also between spaces of different widths."""

import chex
import jax
import jax.numpy as jnp

from jcrosslora.linalg.linear_map import LinearMap, low_rank


def procrustes(cross: jax.Array) -> tuple[LinearMap, jax.Array]:
    """Find the partial isometry P that best maps the rows of X to those of Y, from their cross-moment.

    P maximises tr(P X'Y), and for equal widths minimises ||X P' - Y||_F over orthogonal P (Schoenemann 1966): with
    X'Y = U S V', P = V U'. Directions that the moment does not determine are mapped to zero: those whose singular value
    is below float32 rounding, eps times the longer side times the largest. There are many of them when a few dimensions
    carry most of the energy, and their vectors are noise (on the one real pair measured, keeping them undid the gain).

    Args:
        cross: (M_src, M_tgt), X'Y.

    Returns:
        P (M_tgt, M_src), and the nuclear norm () of the moment, equal to tr(P X'Y).
    """
    chex.assert_rank(cross, 2)
    u, s, vt = jnp.linalg.svd(cross, full_matrices=False)
    reached = s > jnp.finfo(s.dtype).eps * max(cross.shape) * s[0]
    return low_rank(jnp.where(reached, vt.T, 0), jnp.where(reached, u, 0)), jnp.sum(s)
