"""Index interpolation: a baseline of the same public repository as `pad_truncate`."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.maps.coordinates import resampled_maps
from jcrosslora.maps.evidence.records import Evidence, Maps
from jcrosslora.maps.method import MapMethod, Measure


@dataclass(frozen=True)
class IndexInterp(MapMethod):
    """Rows and columns resampled at the nearest index."""

    name: ClassVar[str] = "index-interp"
    summary: ClassVar[str] = "rows and columns resampled at the nearest index"
    reference: ClassVar[str] = "github.com/ootyzzz/PAW, interpo_core.py"
    measure: ClassVar[Measure] = "weight cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return maps that repeat or skip indices."""
        return resampled_maps(evidence)
