"""Theseus (arXiv 2602.12952): orthogonal maps fitted on the activations of both bases on the same text.

For each module, with inputs X and outputs Y collected at the same positions of the same text,

    T_in = polar(X_s' X_t),  T_out = polar(Y_s' Y_t),  dW_t = T_out' dW_s T_in

where polar(C) = U V' for C = U S V'. Nothing is centred. The paper's optional partial whitening is not applied (its
exponent is 0 by default).
"""

import jax.numpy as jnp

from jcrosslora.linalg import procrustes
from jcrosslora.methods.evidence import Evidence, Fit


def fit(evidence: Evidence) -> Fit:
    """P_out = T_out', P_in = T_in'."""
    moments = evidence.activations
    assert moments is not None
    p_in, shared_in = procrustes(moments.inputs)
    p_out, shared_out = procrustes(moments.outputs)
    sizes = jnp.prod(moments.input_energy) * jnp.prod(moments.output_energy)
    # The geometric mean over both sides of tr(P X_s'X_t) / (|X_s| |X_t|), each in [0, 1].
    likeness = jnp.sqrt(shared_in * shared_out / jnp.sqrt(jnp.where(sizes > 0, sizes, 1)))
    return Fit(((p_out, p_in),), activation_cosine=likeness)
