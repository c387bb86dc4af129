"""Methods that keep coordinates: the source's rows and columns as they are, cut or padded, resampled, or selected.

If W_tgt = S_out W_src S_in' with S_out and S_in selecting rows, as for a pruned, permuted or layer-repeated target, the
same selection applied to the adapted source gives dW_tgt = S_out dW_src S_in', exactly (`Select`). `PadTruncate` and
`IndexInterp` are baselines of a public repository with the models of the Cross-LoRA paper. `InterpolatedCopy` sets a
copy on weights between those of the two bases (see `distill.interpolation`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jcrosslora.adapter import Adapter, Carried, fuse, split_fused
from jcrosslora.adapter.combining import add_factors
from jcrosslora.checkpoint import BaseModel
from jcrosslora.distill.interpolation import SourceInterpolation, check_share, interpolate_to_source, interpolation_cost
from jcrosslora.linalg import LinearMap, cosine, select
from jcrosslora.maps import Evidence, EvidenceKind, MapMethod, Maps, Moved, Sizes, Task
from jcrosslora.utils.cost import Cost


@dataclass(frozen=True)
class PadTruncate(MapMethod):
    """Rows and columns cut off or filled with zeros."""

    name = "pad-truncate"
    summary = "rows and columns cut off or filled with zeros"
    reference = "github.com/ootyzzz/PAW, lora_x_core.py"
    measure = "weight cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return rectangular identities, which for equal shapes leave the update as it is."""
        return padded_maps(evidence)


@dataclass(frozen=True)
class Copy(PadTruncate):
    """The unchanged update."""

    name = "copy"
    summary = "the unchanged update"
    reference = "On the Importance of Trivial Baselines (OpenReview vt77NBTZhH)"
    equal_shapes = True
    carries = Carried.LINEAR | Carried.TOKENS | Carried.EXPERTS


@dataclass(frozen=True)
class InterpolatedCopy(Copy):
    """The unchanged update, plus a share of the difference from the target's weights to the source's."""

    name = "interpolated-copy"
    summary = "the unchanged update, on weights interpolated from the target towards the source"
    reference = "this package; interpolation of weights: arXiv 2109.01903"

    interpolation: float = 0.75
    """How far the weights go from the target towards the source: 0 is a plain copy, 1 the weights of the source."""
    svd_rank: int = 8
    """Truncation rank of the difference. Its first directions hold what the two trainings have in common; a higher
    rank removes more of the target's own training."""

    def __post_init__(self) -> None:
        """Refuse a share outside 0 to 1."""
        check_share(self.interpolation)

    def cost(self, sizes: Sizes) -> dict[str, Cost | None]:
        """Count a decomposition of each of the target's modules."""
        return {"interpolate": interpolation_cost(sizes.target, sizes.rank)}

    def move(self, task: Task) -> Moved:
        """Add the low-rank difference, which is computed once for all adapters of a pair."""
        if self not in task.shared:
            task.shared[self] = interpolate_to_source(task.base, task.target, self.interpolation, rank=task.rank)
        found = task.shared[self]
        return Moved(_sum(task.target, task.mapped, found), added=_sentence(found, self.interpolation))


@dataclass(frozen=True)
class IndexInterp(MapMethod):
    """Rows and columns resampled at the nearest index."""

    name = "index-interp"
    summary = "rows and columns resampled at the nearest index"
    reference = "github.com/ootyzzz/PAW, interpo_core.py"
    measure = "weight cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return maps that repeat or skip indices."""
        return resampled_maps(evidence)


@dataclass(frozen=True)
class Select(MapMethod):
    """Rows, columns and layers of the source that the target consists of."""

    name = "select"
    summary = "rows, columns and layers of the source that the target consists of, in its order"
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


def resampled_maps(evidence: Evidence) -> Maps:
    """Return maps that resample rows and columns at the nearest index."""
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    return Maps(((_resampled(o_src, o_tgt), _resampled(i_src, i_tgt)),))


def _padded(size_src: int, size_tgt: int) -> LinearMap:
    index = jnp.arange(size_tgt)
    return select(jnp.minimum(index, size_src - 1), (index < size_src).astype(jnp.float32), size_src)


def _resampled(size_src: int, size_tgt: int) -> LinearMap:
    # floor(i (m - 1) / (n - 1)) in integers: evenly spaced from the first index to the last.
    index = jnp.arange(size_tgt) * (size_src - 1) // max(size_tgt - 1, 1)
    return select(index, jnp.ones(size_tgt), size_src)


def _sum(target: BaseModel, moved: Adapter, found: SourceInterpolation) -> Adapter:
    # Add fused matrices whole, so that parts with a common A keep sharing it; added separately, each would copy A.
    terms = [fuse(part, target.fused) for part in (moved.modules, found.modules)]
    whole = {name: add_factors(name, [part[name] for part in terms if name in part]) for name in terms[0] | terms[1]}
    parts = split_fused(Adapter(whole), target.fused).modules
    return Adapter({name: parts[name] for name in target.modules if name in moved.modules or name in found.modules})


def _sentence(found: SourceInterpolation, share: float) -> str:
    if not found.modules:
        reason = (
            "the two bases have the same weights in all modules" if share else "an interpolation of 0 was asked for"
        )
        return f"nothing is added to the copy: {reason}"
    highest = max(factors.rank for factors in found.modules.values())
    return (
        f"{share:.0%} of the difference from the target's weights to the source's is added to the copy, in "
        f"{len(found.modules)} modules and ranks up to {highest}, which hold {found.kept:.1%} of the difference; while "
        f"the adapter is on, the target gives up {share:.0%} of what they hold of its further training"
    )
