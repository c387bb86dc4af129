"""LoRA-X and ProLoRA: project into leading singular subspaces. Equal shapes only.

LoRA-X (arXiv 2501.16559, Eq. 3) projects into those of the target. ProLoRA (arXiv 2506.04244) moves range and null
space separately: with the projectors P = U U' (range, rank r) and I - P (null space) of both bases on both sides,

    dW_t = P_t^out (P_s^out dW_s P_s^in) P_t^in + (I - P_t^out) ((I - P_s^out) dW_s (I - P_s^in)) (I - P_t^in)

The cross terms (range on one side, null space on the other) are dropped, as in the paper. The two terms double the rank
of the update: 2 K. The paper pairs modules by subspace similarity; here the pairing is given.
"""

from dataclasses import dataclass

import jax

from jcrosslora.linalg import LinearMap, complement, dot, low_rank
from jcrosslora.maps import DEFAULT_SVD_RANK, Evidence, EvidenceKind, MapMethod, Maps


@dataclass(frozen=True)
class LoRAX(MapMethod):
    """Projection into the leading singular subspaces of the target. The source's SVD serves the diagnostics only."""

    name = "lora-x"
    summary = "projection into the target's singular subspaces: U_t U_t' dW V_t V_t'"
    when = "to compare with the paper"
    reference = "arXiv 2501.16559, Eq. 3"
    requires = frozenset({EvidenceKind.SINGULAR_VECTORS})
    measure = "subspace similarity"
    takes_numpy = True
    equal_shapes = True

    svd_rank: int = DEFAULT_SVD_RANK
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = U_t U_t' and P_in = V_t V_t'."""
        svd = evidence.singular_vectors_tgt
        return Maps(((low_rank(svd.u, svd.u), low_rank(svd.v, svd.v)),))


@dataclass(frozen=True)
class ProLoRA(LoRAX):
    """Range and null space of source and target, moved separately, which doubles the rank."""

    name = "prolora"
    summary = "range and null space of source and target, moved separately; rank 2 K"
    when = "to compare with the paper"
    reference = "arXiv 2506.04244"

    def maps(self, evidence: Evidence) -> Maps:
        """Return two terms: through both ranges, and through both complements."""
        src, tgt = evidence.singular_vectors_src, evidence.singular_vectors_tgt
        within = (_both_projections(tgt.u, src.u), _both_projections(tgt.v, src.v))
        outside = (complement(tgt.u, src.u), complement(tgt.v, src.v))
        return Maps((within, outside))


def _both_projections(first: jax.Array, second: jax.Array) -> LinearMap:
    """Return F F' S S'."""
    return low_rank(dot(first, dot(first.T, second)), second)
