"""Transfer methods: one file a method, all returning the same `Fit`, listed in one registry.

Methods know no files and no models: they see the `Evidence` of one pair of modules at a time.
"""

from jcrosslora.methods.registry import METHODS as METHODS
from jcrosslora.methods.registry import Method as Method
from jcrosslora.methods.registry import check_known as check_known
from jcrosslora.methods.registry import get_method as get_method
