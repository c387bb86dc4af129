"""Distilled selection: the parts of the update that a pruned target has, then a fit that starts from them."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.method import MapMethod
from jcrosslora.methods.distill import Distill
from jcrosslora.methods.distilled_copy import DistilledCopy
from jcrosslora.methods.select import Select


@dataclass(frozen=True)
class DistilledSelect(DistilledCopy):
    """The update of the parts that the target has, then fitted as `distilled-copy` is."""

    name: ClassVar[str] = "distilled-select"
    summary: ClassVar[str] = (
        "the update of the parts that the target has, then all modules fitted to the adapted source"
    )
    requires: ClassVar[frozenset[EvidenceKind]] = Select.requires | Distill.requires

    @property
    def start(self) -> MapMethod:
        """Return the selection that the fit starts from."""
        return Select()
