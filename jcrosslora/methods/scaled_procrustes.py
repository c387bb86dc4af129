"""Scaled Procrustes: the orthogonal maps of theseus between activations whose dimensions are divided by their sizes.

For each side of a module, with activations X at the same positions of the same text and D = diag(|x_i|) the sizes of
their dimensions,

    P = polar(D_s^-1 X_s' X_t D_t^-1)',   x_t = D_t P D_s^-1 x_s

The moment of the divided activations holds correlations, so the few dimensions with massive activations, which dominate
an SVD of X_s' X_t, count as much as any other. Outputs map as activations do. Inputs are read by functionals, which map
by the inverse transpose: with x_t = M x_s and P orthogonal, a_t = a_s M^-1, and

    P_out = D_t P D_s^-1 of the outputs,   P_in = D_t^-1 P D_s of the inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jcrosslora.linalg import LinearMap, dimension_sizes, low_rank, procrustes
from jcrosslora.maps.evidence.records import Evidence, EvidenceKind, Maps
from jcrosslora.maps.method import MapMethod, Measure


@dataclass(frozen=True)
class ScaledProcrustes(MapMethod):
    """Theseus on activations whose dimensions are divided by their sizes."""

    name: ClassVar[str] = "scaled-procrustes"
    summary: ClassVar[str] = "theseus on activations whose dimensions are divided by their sizes"
    reference: ClassVar[str] = "this package"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.ACTIVATIONS})
    measure: ClassVar[Measure] = "activation cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out and P_in as above; the sizes have a floor, see `jcrosslora.linalg.least_squares`."""
        moments = evidence.activation_moments
        turn_out, sizes_out, like_out = _aligned(moments.outputs, moments.output_squares)
        turn_in, sizes_in, like_in = _aligned(moments.inputs, moments.input_squares)
        p_out = low_rank(sizes_out[1][:, None] * turn_out.left, turn_out.right / sizes_out[0][:, None])
        p_in = low_rank(turn_in.left / sizes_in[1][:, None], sizes_in[0][:, None] * turn_in.right)
        return Maps(((p_out, p_in),), activation_cosine=jnp.sqrt(like_in * like_out))


def _aligned(
    cross: jax.Array, squares: tuple[jax.Array, jax.Array]
) -> tuple[LinearMap, tuple[jax.Array, jax.Array], jax.Array]:
    """Return P (M_tgt, M_src), the sizes of both sides, and the cosine () of the divided activations mapped by P."""
    sizes = dimension_sizes(squares[0]), dimension_sizes(squares[1])
    turn, shared = procrustes(cross / sizes[0][:, None] / sizes[1])
    energy = jnp.sum(squares[0] / sizes[0] ** 2) * jnp.sum(squares[1] / sizes[1] ** 2)
    return turn, sizes, shared / jnp.sqrt(jnp.where(energy > 0, energy, 1))
