"""Theseus (arXiv 2602.12952): orthogonal maps fitted on the activations of both bases on the same text.

For each module, with inputs X and outputs Y collected at the same positions of the same text,

    T_in = polar(X_s' X_t),  T_out = polar(Y_s' Y_t),  dW_t = T_out' dW_s T_in

where polar(C) = U V' for C = U S V'. Nothing is centred. The paper's optional partial whitening of exponent p in
[0, 1/2] takes polar(G_s^-p C G_t^-p) instead, with the full moments G = X'X of each side, and applies the map to
activations that are not whitened; p is 0 by default in the paper and here. The authors' code raises the eigenvalues of
G to at least 1e-6 in float64; here the floor is the rounding of float32 (see `jcrosslora.linalg.psd_power`).

Scaled Procrustes fits these maps between activations whose dimensions are divided by their sizes. For each side of a
module, with D = diag(|x_i|) the sizes of the dimensions of X,

    P = polar(D_s^-1 X_s' X_t D_t^-1)',   x_t = D_t P D_s^-1 x_s

The moment of the divided activations holds correlations, so the few dimensions with massive activations, which dominate
an SVD of X_s' X_t, count as much as any other. Outputs map as activations do. Inputs are read by functionals, which map
by the inverse transpose: with x_t = M x_s and P orthogonal, a_t = a_s M^-1, and

    P_out = D_t P D_s^-1 of the outputs,   P_in = D_t^-1 P D_s of the inputs.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jcrosslora.errors import UsageError
from jcrosslora.linalg import LinearMap, dimension_sizes, dot, low_rank, procrustes, psd_power
from jcrosslora.maps import Evidence, EvidenceKind, MapMethod, Maps

Pair = tuple[jax.Array, jax.Array]
# At this exponent the activations of both bases have the same spread in all directions.
_MOST_WHITENING = 0.5


@dataclass(frozen=True)
class Theseus(MapMethod):
    """Orthogonal maps fitted on the activations of both bases."""

    name = "theseus"
    summary = "orthogonal maps fitted on activations: polar(Y_t' Y_s) dW polar(X_s' X_t)"
    when = "to see what maps of activations do"
    reference = "arXiv 2602.12952"
    measure = "activation cosine"

    whitening: float = 0.0
    """Exponent of the partial whitening, from 0 (none) to 0.5 (full). Above 0 it takes three times the memory."""

    def check(self) -> None:
        """Refuse an exponent outside 0 to 0.5."""
        if not 0 <= self.whitening <= _MOST_WHITENING:
            msg = f"whitening {self.whitening} is out of range; wanted 0 (none) to {_MOST_WHITENING} (full)"
            raise UsageError(msg)

    @property
    def requires(self) -> frozenset[EvidenceKind]:  # type: ignore[override]
        """Return activations, and their second moments if they are whitened."""
        grams = {EvidenceKind.ACTIVATION_GRAMS} if self.whitening else set()
        return frozenset({EvidenceKind.ACTIVATIONS} | grams)

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = T_out' and P_in = T_in'."""
        moments = evidence.activation_moments
        grams_in, grams_out = evidence.activation_grams if self.whitening else (None, None)
        p_in, like_in = _aligned(moments.inputs, moments.input_squares, grams_in, self.whitening)
        p_out, like_out = _aligned(moments.outputs, moments.output_squares, grams_out, self.whitening)
        return Maps(((p_out, p_in),), activation_cosine=jnp.sqrt(like_in * like_out))


def _aligned(cross: jax.Array, squares: Pair, grams: Pair | None, whitening: float) -> tuple[LinearMap, jax.Array]:
    """Return the map, and tr(P X_s'X_t) / (|X_s| |X_t|) in [0, 1], of the (whitened) activations."""
    energy = jnp.sum(squares[0]) * jnp.sum(squares[1])
    if grams is not None:
        (left, values_src), (right, values_tgt) = (psd_power(gram, -whitening) for gram in grams)
        cross = dot(dot(left, cross), right)
        # |X G^-p|^2 = tr(G^(1 - 2 p))
        energy = jnp.sum(values_src ** (1 - 2 * whitening)) * jnp.sum(values_tgt ** (1 - 2 * whitening))
    turn, shared = procrustes(cross)
    return turn, shared / jnp.sqrt(jnp.where(energy > 0, energy, 1))


@dataclass(frozen=True)
class ScaledProcrustes(MapMethod):
    """Theseus on activations whose dimensions are divided by their sizes."""

    name = "scaled-procrustes"
    summary = "theseus on activations whose dimensions are divided by their sizes"
    when = "to see what maps of activations do"
    reference = "this package"
    requires = frozenset({EvidenceKind.ACTIVATIONS})
    measure = "activation cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out and P_in as above; the sizes have a floor, see `jcrosslora.linalg.dimension_sizes`."""
        moments = evidence.activation_moments
        turn_out, sizes_out, like_out = _aligned_scaled(moments.outputs, moments.output_squares)
        turn_in, sizes_in, like_in = _aligned_scaled(moments.inputs, moments.input_squares)
        p_out = low_rank(sizes_out[1][:, None] * turn_out.left, turn_out.right / sizes_out[0][:, None])
        p_in = low_rank(turn_in.left / sizes_in[1][:, None], sizes_in[0][:, None] * turn_in.right)
        return Maps(((p_out, p_in),), activation_cosine=jnp.sqrt(like_in * like_out))


def _aligned_scaled(cross: jax.Array, squares: Pair) -> tuple[LinearMap, Pair, jax.Array]:
    """Return P (M_tgt, M_src), the sizes of both sides, and the cosine () of the divided activations mapped by P."""
    sizes = dimension_sizes(squares[0]), dimension_sizes(squares[1])
    turn, shared = procrustes(cross / sizes[0][:, None] / sizes[1])
    energy = jnp.sum(squares[0] / sizes[0] ** 2) * jnp.sum(squares[1] / sizes[1] ** 2)
    return turn, sizes, shared / jnp.sqrt(jnp.where(energy > 0, energy, 1))
