"""Select: the rows and columns of the source that a pruned, permuted or layer-repeated target consists of.

If W_tgt = S_out W_src S_in' with S_out and S_in selecting rows, the same selection applied to the adapted source gives
dW_tgt = S_out dW_src S_in', exactly.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jcrosslora.adapter import Carried
from jcrosslora.linalg import LinearMap, select
from jcrosslora.maps.evidence.records import Evidence, EvidenceKind, Maps
from jcrosslora.maps.method import MapMethod, Measure


@dataclass(frozen=True)
class Select(MapMethod):
    """Rows, columns and layers of the source that the target consists of."""

    name: ClassVar[str] = "select"
    summary: ClassVar[str] = "rows, columns and layers of the source that the target consists of, in its order"
    reference: ClassVar[str] = "this package"
    requires: ClassVar[frozenset[EvidenceKind]] = frozenset({EvidenceKind.SELECTION})
    measure: ClassVar[Measure] = "part cosine"
    carries: ClassVar[Carried] = Carried.LINEAR | Carried.TOKENS | Carried.EXPERTS

    def maps(self, evidence: Evidence) -> Maps:
        """Return maps that select the rows of the evidence; rows without a counterpart become zero."""
        chosen = evidence.selected_rows
        (o_src, i_src), w_tgt = evidence.src.weight.shape, evidence.tgt.weight
        p_out, p_in = _choice(chosen.outputs, o_src), _choice(chosen.inputs, i_src)
        carried = p_in(p_out(evidence.src.weight).T).T
        norms = jnp.linalg.norm(carried) * jnp.linalg.norm(w_tgt)
        return Maps(((p_out, p_in),), weight_cosine=jnp.sum(carried * w_tgt) / jnp.where(norms > 0, norms, 1))


def _choice(index: jax.Array, size: int) -> LinearMap:
    return select(jnp.maximum(index, 0), (index >= 0).astype(jnp.float32), size)
