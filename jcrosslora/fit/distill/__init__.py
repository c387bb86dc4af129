"""The second stage of `anchored`: a moved adapter is fitted, in closed form, to what the source's adapter predicts."""

from jcrosslora.fit.distill.run import Refined, refine
from jcrosslora.fit.distill.settings import FitSettings

__all__ = ["FitSettings", "Refined", "refine"]
