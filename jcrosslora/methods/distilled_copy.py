"""Distilled copy: the unchanged update, then fitted to the predictions of the adapted source."""

from dataclasses import dataclass
from typing import ClassVar

from jcrosslora.methods.copy import Copy
from jcrosslora.methods.distill import Distill


@dataclass(frozen=True)
class DistilledCopy(Copy, Distill):
    """The unchanged update, then factors of all modules fitted beside it. The teacher is the adapted source alone."""

    name: ClassVar[str] = "distilled-copy"
    summary: ClassVar[str] = "the unchanged update, then all modules fitted to the adapted source's predictions"
    reference: ClassVar[str] = "this package"

    teacher_weight: float = 1.0
    """Share of the adapted source's own predictions in the teacher."""
    contrast_weight: float = 0.0
    """Weight of the change that the adapter makes in the source's log-probabilities, on top of that."""
