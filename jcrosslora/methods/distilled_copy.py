"""Distilled copy: a copy, then a fit to the predictions of the adapted source that starts from it."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.adapter import Carried
from jcrosslora.maps.evidence.records import EvidenceKind
from jcrosslora.maps.method import MapMethod
from jcrosslora.methods.copy import Copy
from jcrosslora.methods.distill import Distill


@dataclass(frozen=True)
class DistilledCopy(Distill):
    """The unchanged update, then factors of all modules fitted on top of it.

    The teacher is the adapted source alone.
    """

    name: ClassVar[str] = "distilled-copy"
    summary: ClassVar[str] = "the unchanged update, then one fitted on top of it to the adapted source's predictions"
    requires: ClassVar[frozenset[EvidenceKind]] = Copy.requires | Distill.requires
    carries: ClassVar[Carried] = Copy.carries | Distill.carries

    teacher_weight: float = 1.0
    """Share of the adapted source's own predictions in the teacher."""
    contrast_weight: float = 0.0
    """Weight of the change that the adapter makes in the source's log-probabilities, on top of that."""

    @property
    def start(self) -> MapMethod:
        """Return the copy that the fit starts from."""
        return Copy()
