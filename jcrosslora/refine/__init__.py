"""The second stage of `anchored`: a moved adapter is fitted, in closed form, to what the source's adapter predicts."""

from jcrosslora.refine.run import Refined, refine
from jcrosslora.refine.settings import FitSettings

__all__ = ["FitSettings", "Refined", "refine"]
