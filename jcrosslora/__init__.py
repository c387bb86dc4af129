"""Move a LoRA adapter from one base model to a different one, without training data."""

from importlib.metadata import version as _version

from jcrosslora.adapter import Adapter as Adapter
from jcrosslora.adapter import LoRAFactors as LoRAFactors
from jcrosslora.adapter import check_engines as check_engines
from jcrosslora.adapter import load_adapter as load_adapter
from jcrosslora.alignment.align import align as align
from jcrosslora.alignment.transport import Transport as Transport
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
from jcrosslora.evidence.probes import Probes as Probes
from jcrosslora.evidence.probes import written_probes as written_probes
from jcrosslora.export.export import ExportSettings as ExportSettings
from jcrosslora.export.export import export_adapter as export_adapter
from jcrosslora.export.merge import MergeSettings as MergeSettings
from jcrosslora.export.merge import merge as merge
from jcrosslora.lineage.base_comparison import BaseComparison as BaseComparison
from jcrosslora.lineage.base_comparison import compare_bases as compare_bases
from jcrosslora.lineage.pairing import Pairing as Pairing
from jcrosslora.methods import METHODS as METHODS
from jcrosslora.methods import Method as Method
from jcrosslora.methods import register_method as register_method
from jcrosslora.report.record import TransferReport as TransferReport
from jcrosslora.report.verdict import verdict as verdict
from jcrosslora.session.result import TransferResult as TransferResult
from jcrosslora.session.saving import save_adapter as save_adapter
from jcrosslora.session.settings import TransferSettings as TransferSettings
from jcrosslora.session.transfer import shift as shift
from jcrosslora.session.transfer import transfer as transfer
from jcrosslora.shifting.apply import apply as apply

__version__ = _version("jcrosslora")
