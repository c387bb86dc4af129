"""Transfer methods, one file a method with its variants: frozen dataclasses that own their hyper-parameters.

The maths of a method sees the `Evidence` of one pair of modules at a time; it knows no files and no models.
"""

from jcrosslora.maps import MapMethod as MapMethod
from jcrosslora.maps import Method as Method
from jcrosslora.maps import Moved as Moved
from jcrosslora.maps import Task as Task
from jcrosslora.methods.copy import Copy as Copy
from jcrosslora.methods.copy import PadTruncate as PadTruncate
from jcrosslora.methods.copy import Select as Select
from jcrosslora.methods.cross_lora import CrossLoRA as CrossLoRA
from jcrosslora.methods.cross_lora import LoRAX as LoRAX
from jcrosslora.methods.cross_lora import ProLoRA as ProLoRA
from jcrosslora.methods.cross_lora import Random as Random
from jcrosslora.methods.fits import Distill as Distill
from jcrosslora.methods.fits import DistilledCopy as DistilledCopy
from jcrosslora.methods.fits import DistilledSelect as DistilledSelect
from jcrosslora.methods.interpolated_copy import CompensatedCopy as CompensatedCopy
from jcrosslora.methods.interpolated_copy import InterpolatedCopy as InterpolatedCopy
from jcrosslora.methods.lorasuite import LoRASuite as LoRASuite
from jcrosslora.methods.registry import AUTO as AUTO
from jcrosslora.methods.registry import METHODS as METHODS
from jcrosslora.methods.registry import Auto as Auto
from jcrosslora.methods.registry import MethodLike as MethodLike
from jcrosslora.methods.registry import allow_module as allow_module
from jcrosslora.methods.registry import find_method as find_method
from jcrosslora.methods.registry import hyper_types as hyper_types
from jcrosslora.methods.registry import make_chosen as make_chosen
from jcrosslora.methods.registry import make_method as make_method
from jcrosslora.methods.registry import register_method as register_method
from jcrosslora.methods.registry import setting_fields as setting_fields
from jcrosslora.methods.theseus import ScaledProcrustes as ScaledProcrustes
from jcrosslora.methods.theseus import Theseus as Theseus
