"""The second stage of `distill`: a moved adapter is fitted, in closed form, to what the source's adapter predicts."""

from jcrosslora.fit.distill.run import Distilled, distill
from jcrosslora.fit.distill.settings import FitSettings

__all__ = ["Distilled", "FitSettings", "distill"]
