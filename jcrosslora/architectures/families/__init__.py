"""The supported families, and notes on unsupported ones.

Sources: the modelling code of transformers 5 and the `config.json` files of published models. Unknown keys are refused
(see `config.py`), because they may change the meaning of the weights.
"""

import importlib
import pkgutil
from collections.abc import Mapping

from jcrosslora.architectures.family import Family

# The order in which families are listed, and tried on files that do not say which of several families they belong to.
_NAMES = (
    "llama mistral qwen2 qwen3 gemma2 gemma3_text phi3 smollm3 ministral3 olmo2 olmo3 granite glm glm4 cohere "
    "cohere2 exaone4 seed_oss hunyuan_v1_dense gemma starcoder2 phi nemotron apertus arcee ernie4_5 lfm2 "
    "qwen3_5_text granitemoehybrid bamba falcon_h1 nemotron_h olmo_hybrid mixtral qwen3_moe olmoe granitemoe "
    "glm4_moe gpt_oss deepseek_v3 deepseek_v2 mistral4 qwen2_moe exaone_moe ernie4_5_moe qwen3_5_moe_text "
    "qwen3_next lfm2_moe phimoe gemma4_text gemma4_unified_text llama4_text cohere2_moe hunyuan_v1_moe"
)
_MODULES = [importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]
_FOUND = {one.name: one for module in _MODULES for one in vars(module).values() if isinstance(one, Family)}
FAMILIES: dict[str, Family] = {name: _FOUND[name] for name in _NAMES.split()}

_GEMMA3N = (
    "gemma4_text",
    "four residual streams that predict each other (AltUp), learned low-rank residuals (LAuReL), and MLPs that keep "
    "only their largest features",
)
# model_type of unsupported models, alone or inside a multimodal one -> the family that it resembles, and what the
# decoder lacks for it.
UNSUPPORTED: Mapping[str, tuple[str, str]] = {"gemma3n": _GEMMA3N, "gemma3n_text": _GEMMA3N}
