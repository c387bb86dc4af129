"""Cross-LoRA (arXiv 2508.05232): LoRA-Align and LoRA-Shift, in the one reading that its equations allow.

As printed, with W = U S V' truncated to rank r on both sides:

    Eq. 3, 4   P_U = argmin ||P U_s - U_t||_F^2,   P_V = argmin ||P V_s - V_t||_F^2
    Eq. 5, 6   U~_s = P_U U_s,                     V~_s = P_V V_s
    Eq. 7      dW_t = U~_s (U~_s' dW_s V~_s) V~_s'

U_s has orthonormal columns, so Eq. 3 is solved by P_U = U_t U_s' with a minimum of exactly zero, and U~_s = U_t: the
"aligned" basis is the target's own, whatever the source is. With equal shapes Eq. 7 is therefore
U_t U_t' dW_s V_t V_t', which is LoRA-X (method `lora-x` here). With unequal shapes it cannot be evaluated, because
U~_s' and dW_s do not fit. The only reading that fits all shapes applies the maps of Eq. 3 and 4 to the update,

    dW_t = P_U dW_s P_V' = U_t (U_s' dW_s V_s) V_t'

and sends the i-th singular pair of the source to the i-th of the target. Singular pairs are defined up to a joint
sign, so this is U_t D U_s' dW_s V_s D V_t' with a diagonal D of signs that the paper does not mention; `sign_anchor`
chooses them.
"""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.evidence.kinds import EvidenceKind
from jcrosslora.evidence.records import Evidence, Maps
from jcrosslora.linalg import low_rank
from jcrosslora.methods.base import DEFAULT_SVD_RANK, Measure, Method
from jcrosslora.methods.sign_anchor import joint_signs


@dataclass(frozen=True)
class CrossLoRA(Method):
    """The i-th singular pair of the source goes to the i-th of the target."""

    name: ClassVar[str] = "cross-lora"
    summary: ClassVar[str] = "i-th singular pair of the source to the i-th of the target: U_t D U_s' dW V_s D V_t'"
    reference: ClassVar[str] = "arXiv 2508.05232, Eq. 3-7"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset(
        {EvidenceKind.SINGULAR_VECTORS, EvidenceKind.SHARED_VOCABULARY}
    )
    measure: ClassVar[Measure] = "vector ratio"
    single_vectors: ClassVar[bool] = True

    svd_rank: int = DEFAULT_SVD_RANK
    """Truncation rank R of the SVDs. A module whose short side is smaller uses that."""

    def maps(self, evidence: Evidence) -> Maps:
        """Return P_out = U_t D U_s' and P_in = V_t D V_s'."""
        src, tgt = evidence.src.svd, evidence.tgt.svd
        assert src is not None
        assert tgt is not None
        signs, ratio = joint_signs(evidence)
        return Maps(((low_rank(tgt.u * signs, src.u), low_rank(tgt.v * signs, src.v)),), ratio)
