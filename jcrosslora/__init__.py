"""Move a LoRA adapter from one base model to a different one, without training data."""

from importlib.metadata import version as _version

from jcrosslora.adapter import Adapter as Adapter
from jcrosslora.adapter import LoRAFactors as LoRAFactors
from jcrosslora.adapter import check_engines as check_engines
from jcrosslora.adapter import load_adapter as load_adapter
from jcrosslora.cache import Cache as Cache
from jcrosslora.cache import open_cache as open_cache
from jcrosslora.checkpoint import BaseModel as BaseModel
from jcrosslora.checkpoint import open_base as open_base
from jcrosslora.errors import AdapterError as AdapterError
from jcrosslora.errors import CacheError as CacheError
from jcrosslora.errors import CheckpointError as CheckpointError
from jcrosslora.errors import HostError as HostError
from jcrosslora.errors import JCrossLoRAError as JCrossLoRAError
from jcrosslora.errors import MethodError as MethodError
from jcrosslora.errors import OutputError as OutputError
from jcrosslora.errors import PairingError as PairingError
from jcrosslora.errors import ShortMemoryError as ShortMemoryError
from jcrosslora.errors import UsageError as UsageError
from jcrosslora.export import ExportSettings as ExportSettings
from jcrosslora.export import export_adapter as export_adapter
from jcrosslora.lora_align import align as align
from jcrosslora.lora_shift import MovedAdapter as MovedAdapter
from jcrosslora.lora_shift import shift as shift
from jcrosslora.merging import MergeSettings as MergeSettings
from jcrosslora.merging import merge as merge
from jcrosslora.methods import METHODS as METHODS
from jcrosslora.pairing import Pairing as Pairing
from jcrosslora.probes import Probes as Probes
from jcrosslora.probes import written_probes as written_probes
from jcrosslora.relation import Relation as Relation
from jcrosslora.relation import relate as relate
from jcrosslora.report.record import TransferReport as TransferReport
from jcrosslora.report.verdict import verdict as verdict
from jcrosslora.transport import Transport as Transport
from jcrosslora.trip import TransferSettings as TransferSettings
from jcrosslora.trip import save_adapter as save_adapter
from jcrosslora.trip import transfer as transfer

__version__ = _version("jcrosslora")
