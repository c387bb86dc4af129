"""Rows and columns of the source where the target has them: for bases that are pruned, permuted or repeated.

Where W_tgt = S_out W_src S_in' with S_out and S_in that choose rows, the update that the adapted source would have
after the same treatment is dW_tgt = S_out dW_src S_in', exactly.
"""

import jax
import jax.numpy as jnp

from jcrosslora.evidence.records import Evidence, Fit
from jcrosslora.linalg import LinearMap, select


def fit(evidence: Evidence) -> Fit:
    """P_out and P_in choose what the evidence names; rows without a counterpart get nothing."""
    chosen = evidence.selection
    assert chosen is not None
    (o_src, i_src), w_tgt = evidence.src.weight.shape, evidence.tgt.weight
    p_out, p_in = _choice(chosen.outputs, o_src), _choice(chosen.inputs, i_src)
    carried = p_in(p_out(evidence.src.weight).T).T
    norms = jnp.linalg.norm(carried) * jnp.linalg.norm(w_tgt)
    return Fit(((p_out, p_in),), weight_cosine=jnp.sum(carried * w_tgt) / jnp.where(norms > 0, norms, 1))


def _choice(index: jax.Array, size: int) -> LinearMap:
    return select(jnp.maximum(index, 0), (index >= 0).astype(jnp.float32), size)
