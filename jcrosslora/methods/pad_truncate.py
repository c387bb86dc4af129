"""Pad and truncate: the baseline of a public repository with the models of the Cross-LoRA paper."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.evidence.records import Evidence, Maps
from jcrosslora.methods.base import MapMethod, Measure
from jcrosslora.methods.coordinates import padded_maps


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
