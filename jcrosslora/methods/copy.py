"""Copy: the unchanged update."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.adapter import Carried
from jcrosslora.maps.coordinates import padded_maps
from jcrosslora.maps.evidence.records import Evidence, Maps
from jcrosslora.maps.method import MapMethod, Measure


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
