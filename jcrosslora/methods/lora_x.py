"""LoRA-X (arXiv 2501.16559, Eq. 3): keep what lies in the target's leading singular subspaces. Equal shapes only."""

from jcrosslora.evidence.records import Evidence, Fit
from jcrosslora.linalg import low_rank


def fit(evidence: Evidence) -> Fit:
    """P_out = U_t U_t', P_in = V_t V_t'."""
    svd = evidence.tgt.svd
    assert svd is not None
    return Fit(((low_rank(svd.u, svd.u), low_rank(svd.v, svd.v)),))
