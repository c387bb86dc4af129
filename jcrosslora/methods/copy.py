"""Copy: the unchanged update."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.adapter import Carried
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
    carries: ClassVar[Carried] = Carried.LINEAR | Carried.TOKENS | Carried.EXPERTS

    def maps(self, evidence: Evidence) -> Maps:
        """Return identities."""
        return padded_maps(evidence)
