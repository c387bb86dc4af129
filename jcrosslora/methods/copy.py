"""Methods that keep coordinates: the source's rows and columns unchanged, cut or padded, or selected.

If W_tgt = S_out W_src S_in' with S_out and S_in selecting rows, as for a pruned, permuted or layer-repeated target, the
same selection applied to the adapted source gives dW_tgt = S_out dW_src S_in', exactly (`Select`). `PadTruncate` is
a baseline of a public repository with the models of the Cross-LoRA paper.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jcrosslora.adapter import Carried
from jcrosslora.linalg import LinearMap, cosine, select
from jcrosslora.maps import Evidence, EvidenceKind, MapMethod, Maps


@dataclass(frozen=True)
class PadTruncate(MapMethod):
    """Rows and columns cut off or filled with zeros."""

    name = "pad-truncate"
    summary = "rows and columns cut off or filled with zeros"
    when = "as a baseline"
    reference = "github.com/ootyzzz/PAW, lora_x_core.py"
    measure = "weight cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return rectangular identities, which for equal shapes leave the update unchanged."""
        return padded_maps(evidence)


@dataclass(frozen=True)
class Copy(PadTruncate):
    """The unchanged update."""

    name = "copy"
    summary = "the unchanged update"
    when = "for a base and its 8-bit or fp8 copy"
    reference = "On the Importance of Trivial Baselines (OpenReview vt77NBTZhH)"
    equal_shapes = True
    carries = Carried.LINEAR | Carried.TOKENS | Carried.EXPERTS


@dataclass(frozen=True)
class Select(MapMethod):
    """Rows, columns and layers of the source that the target consists of."""

    name = "select"
    summary = "rows, columns and layers of the source that the target consists of, in its order"
    when = "for a base and a model cut from it"
    reference = "this package"
    requires = frozenset({EvidenceKind.SELECTION})
    measure = "part cosine"
    carries = Carried.LINEAR | Carried.TOKENS | Carried.EXPERTS

    def maps(self, evidence: Evidence) -> Maps:
        """Return maps that select the rows of the evidence; rows without a counterpart become zero."""
        chosen = evidence.selected_rows
        o_src, i_src = evidence.src.weight.shape
        p_out, p_in = _choice(chosen.outputs, o_src), _choice(chosen.inputs, i_src)
        carried = p_in(p_out(evidence.src.weight).T).T
        return Maps(((p_out, p_in),), weight_cosine=cosine(carried, evidence.tgt.weight))


def _choice(index: jax.Array, size: int) -> LinearMap:
    return select(jnp.maximum(index, 0), (index >= 0).astype(jnp.float32), size)


def padded_maps(evidence: Evidence) -> Maps:
    """Return rectangular identities, which cut off surplus rows and columns or fill missing ones with zeros."""
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    return Maps(((_padded(o_src, o_tgt), _padded(i_src, i_tgt)),))


def _padded(size_src: int, size_tgt: int) -> LinearMap:
    index = jnp.arange(size_tgt)
    return select(jnp.minimum(index, size_src - 1), (index < size_src).astype(jnp.float32), size_src)
