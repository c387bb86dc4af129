"""LoRA adapters: files of PEFT, MLX and llama.cpp in and out, fused modules, which engines read them."""

from jcrosslora.adapter.combining import stack_adapters as stack_adapters
from jcrosslora.adapter.combining import unstack_adapters as unstack_adapters
from jcrosslora.adapter.engines import EngineVerdict as EngineVerdict
from jcrosslora.adapter.engines import check_engines as check_engines
from jcrosslora.adapter.factors import LoRAFactors as LoRAFactors
from jcrosslora.adapter.factors import update_norm as update_norm
from jcrosslora.adapter.fused import fuse as fuse
from jcrosslora.adapter.fused import split_fused as split_fused
from jcrosslora.adapter.ignored import Carried as Carried
from jcrosslora.adapter.kinds.lora_x import lora_x_update as lora_x_update
from jcrosslora.adapter.kinds.sd_lora import stack_tasks as stack_tasks
from jcrosslora.adapter.live_peft import adapter_from_peft as adapter_from_peft
from jcrosslora.adapter.live_peft import to_peft as to_peft
from jcrosslora.adapter.load import from_pytree as from_pytree
from jcrosslora.adapter.load import load_adapter as load_adapter
from jcrosslora.adapter.load import to_pytree as to_pytree
from jcrosslora.adapter.records import Adapter as Adapter
from jcrosslora.adapter.records import AdapterInfo as AdapterInfo
from jcrosslora.adapter.records import Change as Change
from jcrosslora.adapter.records import describe_adapter as describe_adapter
from jcrosslora.adapter.save import save_adapter as save_adapter
