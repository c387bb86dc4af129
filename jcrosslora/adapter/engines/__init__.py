"""Rules of the engines that load adapters, one file an engine.

The rules were read in the engines' sources, which each file names with the time of reading. Engines change, so a
verdict is a forecast, not a test run.
"""

from jcrosslora.adapter.engines.check import EngineVerdict as EngineVerdict
from jcrosslora.adapter.engines.check import check_engines as check_engines
