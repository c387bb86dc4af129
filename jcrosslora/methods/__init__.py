"""Transfer methods: one file a method, all returning the same `Fit`, listed in one registry.

Methods know no files and no models: they see the `Evidence` of one pair of modules at a time.
"""

from jcrosslora.methods.evidence import Activations as Activations
from jcrosslora.methods.evidence import Evidence as Evidence
from jcrosslora.methods.evidence import Fit as Fit
from jcrosslora.methods.evidence import HeadMatch as HeadMatch
from jcrosslora.methods.evidence import Selection as Selection
from jcrosslora.methods.evidence import Side as Side
from jcrosslora.methods.evidence import Terms as Terms
from jcrosslora.methods.evidence import Vocabulary as Vocabulary
from jcrosslora.methods.registry import METHODS as METHODS
from jcrosslora.methods.registry import Method as Method
from jcrosslora.methods.registry import check_known as check_known
from jcrosslora.methods.registry import get_method as get_method
