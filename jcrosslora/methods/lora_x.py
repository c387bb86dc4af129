"""LoRA-X (arXiv 2501.16559, Eq. 3): project into the target's leading singular subspaces. Equal shapes only."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.linalg import low_rank
from jcrosslora.maps.evidence.records import Evidence, EvidenceKind, Maps
from jcrosslora.maps.method import DEFAULT_SVD_RANK, MapMethod, Measure


@dataclass(frozen=True)
class LoRAX(MapMethod):
    """Projection into the leading singular subspaces of the target. The source's SVD serves the diagnostics only."""

    name: ClassVar[str] = "lora-x"
    summary: ClassVar[str] = "projection into the target's singular subspaces: U_t U_t' dW V_t V_t'"
    reference: ClassVar[str] = "arXiv 2501.16559, Eq. 3"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.SINGULAR_VECTORS})
    measure: ClassVar[Measure] = "subspace similarity"
    equal_shapes: ClassVar[bool] = True

    svd_rank: int = DEFAULT_SVD_RANK
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = U_t U_t' and P_in = V_t V_t'."""
        svd = evidence.singular_vectors_tgt
        return Maps(((low_rank(svd.u, svd.u), low_rank(svd.v, svd.v)),))
