"""Interpolated copy: the unchanged update, on weights between those of the two bases (see `distill.interpolation`)."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.adapter import Adapter, fuse, split_fused
from jcrosslora.adapter.combining import add_factors
from jcrosslora.checkpoint import BaseModel
from jcrosslora.distill.interpolation import SourceInterpolation, check_share, interpolate_to_source, interpolation_cost
from jcrosslora.maps.method import Moved, Sizes, Task
from jcrosslora.methods.copy import Copy
from jcrosslora.utils.cost import Cost


@dataclass(frozen=True)
class InterpolatedCopy(Copy):
    """The unchanged update, plus a share of the difference from the target's weights to the source's."""

    name: ClassVar[str] = "interpolated-copy"
    summary: ClassVar[str] = "the unchanged update, on weights interpolated from the target towards the source"
    reference: ClassVar[str] = "this package; interpolation of weights: arXiv 2109.01903"

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
