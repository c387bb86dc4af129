"""Copy: the unchanged update."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.evidence.records import Evidence, Maps
from jcrosslora.methods.base import MapMethod, Measure
from jcrosslora.methods.coordinates import padded_maps


@dataclass(frozen=True)
class Copy(MapMethod):
    """The unchanged update."""

    name: ClassVar[str] = "copy"
    summary: ClassVar[str] = "the unchanged update"
    reference: ClassVar[str] = "On the Importance of Trivial Baselines (OpenReview vt77NBTZhH)"
    measure: ClassVar[Measure] = "weight cosine"
    equal_shapes: ClassVar[bool] = True
    preserves_residual_basis: ClassVar[bool] = True
    carries_experts: ClassVar[bool] = True

    def maps(self, evidence: Evidence) -> Maps:
        """Return identities."""
        return padded_maps(evidence)
