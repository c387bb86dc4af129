"""Distillation: fit an update of the target, in closed form, to the predictions of the source with its adapter."""

from jcrosslora.fit.distill.run import Distilled, distill
from jcrosslora.fit.distill.settings import DistillSettings

__all__ = ["DistillSettings", "Distilled", "distill"]
