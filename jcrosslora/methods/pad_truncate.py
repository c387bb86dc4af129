"""Pad and truncate: the baseline of a public repository with the models of the Cross-LoRA paper."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.maps.coordinates import padded_maps
from jcrosslora.maps.evidence.records import Evidence, Maps
from jcrosslora.maps.method import MapMethod, Measure


@dataclass(frozen=True)
class PadTruncate(MapMethod):
    """Rows and columns cut off or filled with zeros."""

    name: ClassVar[str] = "pad-truncate"
    summary: ClassVar[str] = "rows and columns cut off or filled with zeros"
    reference: ClassVar[str] = "github.com/ootyzzz/PAW, lora_x_core.py"
    measure: ClassVar[Measure] = "weight cosine"

    def maps(self, evidence: Evidence) -> Maps:
        """Return rectangular identities."""
        return padded_maps(evidence)
