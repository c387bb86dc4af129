"""ProLoRA (arXiv 2506.04244): carry range and null space over separately. Equal shapes only.

With the projectors P = U U' (range, rank r) and I - P (the rest) of both bases on both sides,

    dW_t = P_t^out (P_s^out dW_s P_s^in) P_t^in + (I - P_t^out) ((I - P_s^out) dW_s (I - P_s^in)) (I - P_t^in)

The cross terms (range on one side, rest on the other) are dropped, as in the paper. The two terms double the rank of
the update: 2 K. The paper pairs modules by subspace similarity; here the pairing is given.
"""

import jax

from jcrosslora.evidence.records import Evidence, Fit
from jcrosslora.linalg import LinearMap, complement, dot, low_rank


def fit(evidence: Evidence) -> Fit:
    """Two terms: through both ranges, and through both complements."""
    src, tgt = evidence.src.svd, evidence.tgt.svd
    assert src is not None
    assert tgt is not None
    within = (_both_projections(tgt.u, src.u), _both_projections(tgt.v, src.v))
    outside = (complement(tgt.u, src.u), complement(tgt.v, src.v))
    return Fit((within, outside))


def _both_projections(first: jax.Array, second: jax.Array) -> LinearMap:
    """F F' S S'."""
    return low_rank(dot(first, dot(first.T, second)), second)
