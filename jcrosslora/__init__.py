"""Move a LoRA adapter from one base model to a different one, without training data.

The public names are listed once, in `__init__.pyi`, which type checkers read as well. A name's module is imported when
the name is first used, so that `import jcrosslora` costs milliseconds.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

if _TYPE_CHECKING:
    from jcrosslora import errors as errors
    from jcrosslora import methods as methods
    from jcrosslora.adapter import Adapter as Adapter
    from jcrosslora.adapter import LoRAFactors as LoRAFactors
    from jcrosslora.adapter import check_engines as check_engines
    from jcrosslora.adapter import load_adapter as load_adapter
    from jcrosslora.adapter import stack_adapters as stack_adapters
    from jcrosslora.adapter import unstack_adapters as unstack_adapters
    from jcrosslora.adapter.export import ExportSettings as ExportSettings
    from jcrosslora.adapter.export import export_adapter as export_adapter
    from jcrosslora.adapter.merge import MergeSettings as MergeSettings
    from jcrosslora.adapter.merge import merge as merge
    from jcrosslora.checkpoint import BaseModel as BaseModel
    from jcrosslora.checkpoint import open_base as open_base
    from jcrosslora.distill.sources.models import ServedModel as ServedModel
    from jcrosslora.distill.sources.models import TorchModel as TorchModel
    from jcrosslora.errors import AdapterError as AdapterError
    from jcrosslora.errors import BatchError as BatchError
    from jcrosslora.errors import CacheError as CacheError
    from jcrosslora.errors import CheckpointError as CheckpointError
    from jcrosslora.errors import HostError as HostError
    from jcrosslora.errors import JCrossLoRAError as JCrossLoRAError
    from jcrosslora.errors import LostHostError as LostHostError
    from jcrosslora.errors import MethodError as MethodError
    from jcrosslora.errors import OutputError as OutputError
    from jcrosslora.errors import PairingError as PairingError
    from jcrosslora.errors import ShortMemoryError as ShortMemoryError
    from jcrosslora.errors import SourceError as SourceError
    from jcrosslora.errors import UsageError as UsageError
    from jcrosslora.evaluate import answer as answer
    from jcrosslora.evaluate import score as score
    from jcrosslora.evaluate.probes import Probes as Probes
    from jcrosslora.evaluate.probes import written_probes as written_probes
    from jcrosslora.maps.alignment.transport import Transport as Transport
    from jcrosslora.maps.evidence.records import Evidence as Evidence
    from jcrosslora.maps.evidence.records import EvidenceKind as EvidenceKind
    from jcrosslora.maps.evidence.records import Maps as Maps
    from jcrosslora.maps.shifting.apply import apply as apply
    from jcrosslora.methods import MapMethod as MapMethod
    from jcrosslora.methods import Method as Method
    from jcrosslora.methods import register_method as register_method
    from jcrosslora.relation.base_comparison import BaseComparison as BaseComparison
    from jcrosslora.relation.base_comparison import compare_bases as compare_bases
    from jcrosslora.relation.pairing import Pairing as Pairing
    from jcrosslora.report.record import TransferReport as TransferReport
    from jcrosslora.report.table import verdict as verdict
    from jcrosslora.session.batch import read_plan as read_plan
    from jcrosslora.session.batch import run_batch as run_batch
    from jcrosslora.session.estimate import Estimate as Estimate
    from jcrosslora.session.files import estimate_files as estimate_files
    from jcrosslora.session.files import transfer_files as transfer_files
    from jcrosslora.session.result import TransferResult as TransferResult
    from jcrosslora.session.saving import push_to_hub as push_to_hub
    from jcrosslora.session.saving import save_adapter as save_adapter
    from jcrosslora.session.settings import TransferSettings as TransferSettings
    from jcrosslora.session.transfer import align as align
    from jcrosslora.session.transfer import shift as shift
    from jcrosslora.session.transfer import transfer as transfer
    from jcrosslora.shelf import Retrieved as Retrieved
    from jcrosslora.shelf import Shelf as Shelf
    from jcrosslora.shelf.composition import Composed as Composed
    from jcrosslora.shelf.composition import compose as compose
    from jcrosslora.shelf.composition import load_composition as load_composition
    from jcrosslora.training import TrainingSettings as TrainingSettings
    from jcrosslora.training import fit_magnitudes as fit_magnitudes
    from jcrosslora.training import train_lora as train_lora
    from jcrosslora.utils.cache import Cache as Cache
    from jcrosslora.utils.cache import open_cache as open_cache
    from jcrosslora.utils.logs import log_to as log_to
    from jcrosslora.utils.progress import show_progress as show_progress

    __version__: str

# Each module below the package with the public names that come from it. The block above repeats them for type checkers;
# a test compares the two.
_MODULES: dict[str, tuple[str, ...]] = {
    "adapter": ("Adapter", "LoRAFactors", "check_engines", "load_adapter", "stack_adapters", "unstack_adapters"),
    "maps.alignment.transport": ("Transport",),
    "session.batch": ("read_plan", "run_batch"),
    "utils.cache": ("Cache", "open_cache"),
    "checkpoint": ("BaseModel", "open_base"),
    "shelf.composition": ("Composed", "compose", "load_composition"),
    "errors": (
        "AdapterError",
        "BatchError",
        "CacheError",
        "CheckpointError",
        "HostError",
        "JCrossLoRAError",
        "LostHostError",
        "MethodError",
        "OutputError",
        "PairingError",
        "ShortMemoryError",
        "SourceError",
        "UsageError",
    ),
    "evaluate": ("answer", "score"),
    "evaluate.probes": ("Probes", "written_probes"),
    "maps.evidence.records": ("Evidence", "EvidenceKind", "Maps"),
    "adapter.export": ("ExportSettings", "export_adapter"),
    "adapter.merge": ("MergeSettings", "merge"),
    "relation.base_comparison": ("BaseComparison", "compare_bases"),
    "relation.pairing": ("Pairing",),
    "utils.logs": ("log_to",),
    "utils.progress": ("show_progress",),
    "methods": ("MapMethod", "Method", "register_method"),
    "report.record": ("TransferReport",),
    "report.table": ("verdict",),
    "session.estimate": ("Estimate",),
    "session.files": ("estimate_files", "transfer_files"),
    "session.result": ("TransferResult",),
    "session.saving": ("push_to_hub", "save_adapter"),
    "session.settings": ("TransferSettings",),
    "session.transfer": ("align", "shift", "transfer"),
    "shelf": ("Retrieved", "Shelf"),
    "maps.shifting.apply": ("apply",),
    "distill.sources.models": ("ServedModel", "TorchModel"),
    "training": ("TrainingSettings", "fit_magnitudes", "train_lora"),
}
_PUBLIC_MODULES = ("errors", "methods")
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> _Any:
    if name == "__version__":
        from jcrosslora.utils import version

        value: _Any = version()
    elif name == "__all__":  # what `from jcrosslora import *` asks for
        return [name for name in __dir__() if name != "__version__"]
    elif name not in _HOMES:
        msg = f"module 'jcrosslora' has no attribute {name!r}"
        raise AttributeError(msg)
    elif _HOMES[name] == __name__:
        return _import_module(f"{__name__}.{name}")
    else:
        value = getattr(_import_module(_HOMES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted((*_HOMES, "__version__"))
