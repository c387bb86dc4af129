"""Theseus (arXiv 2602.12952): orthogonal maps fitted on the activations of both bases on the same text.

For each module, with inputs X and outputs Y collected at the same positions of the same text,

    T_in = polar(X_s' X_t),  T_out = polar(Y_s' Y_t),  dW_t = T_out' dW_s T_in

where polar(C) = U V' for C = U S V'. Nothing is centred. The paper's optional partial whitening of exponent p in
[0, 1/2] takes polar(G_s^-p C G_t^-p) instead, with the full moments G = X'X of each side, and applies the map to
activations that are not whitened; p is 0 by default in the paper and here. The authors' code raises the eigenvalues of
G to at least 1e-6 in float64; here the floor is the rounding of float32 (see `jcrosslora.linalg.psd_power`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jcrosslora.errors import UsageError
from jcrosslora.linalg import LinearMap, dot, procrustes, psd_power
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
        """Raise UsageError for an exponent outside 0 to 0.5."""
        if not 0 <= self.whitening <= _MOST_WHITENING:
            raise UsageError(
                f"whitening {self.whitening} is out of range; expected 0 (none) to {_MOST_WHITENING} (full)"
            )

    @property
    def requires(self) -> frozenset[EvidenceKind]:  # type: ignore[override]
        """Require activations, and their second moments for whitening."""
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
