"""LoRA adapters: files of PEFT, MLX and llama.cpp in and out, fused modules, which engines read them."""

from jcrosslora.adapter.engines import EngineVerdict as EngineVerdict
from jcrosslora.adapter.engines import check_engines as check_engines
from jcrosslora.adapter.fused import fuse as fuse
from jcrosslora.adapter.fused import split_fused as split_fused
from jcrosslora.adapter.load import load_adapter as load_adapter
from jcrosslora.adapter.norms import describe_adapter as describe_adapter
from jcrosslora.adapter.norms import update_norm as update_norm
from jcrosslora.adapter.records import Adapter as Adapter
from jcrosslora.adapter.records import AdapterInfo as AdapterInfo
from jcrosslora.adapter.records import LoRAFactors as LoRAFactors
from jcrosslora.adapter.save import save_adapter as save_adapter
