"""The supported families, and what is known of those that are not.

Sources: the modelling code of transformers 5 and the `config.json` files of published models. A key that is in no table
is refused (see `config.py`), because it may change what the weights mean.
"""

from collections.abc import Mapping

from jcrosslora.checkpoint.family.apertus import APERTUS
from jcrosslora.checkpoint.family.arcee import ARCEE
from jcrosslora.checkpoint.family.cohere import COHERE, COHERE2, COHERE2_MOE
from jcrosslora.checkpoint.family.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from jcrosslora.checkpoint.family.ernie import ERNIE4_5, ERNIE4_5_MOE
from jcrosslora.checkpoint.family.exaone4 import EXAONE4, EXAONE_MOE
from jcrosslora.checkpoint.family.gemma import GEMMA, GEMMA2, GEMMA3
from jcrosslora.checkpoint.family.gemma4 import GEMMA4, GEMMA4_UNIFIED
from jcrosslora.checkpoint.family.glm import GLM, GLM4, GLM4_MOE
from jcrosslora.checkpoint.family.gpt_oss import GPT_OSS
from jcrosslora.checkpoint.family.granite import GRANITE, GRANITEMOE
from jcrosslora.checkpoint.family.hunyuan import HUNYUAN_V1_DENSE, HUNYUAN_V1_MOE
from jcrosslora.checkpoint.family.keys import COMMON_KEYS as COMMON_KEYS
from jcrosslora.checkpoint.family.keys import HARMLESS_KEYS as HARMLESS_KEYS
from jcrosslora.checkpoint.family.lfm2 import LFM2, LFM2_MOE
from jcrosslora.checkpoint.family.llama import LLAMA
from jcrosslora.checkpoint.family.llama4 import LLAMA4
from jcrosslora.checkpoint.family.mamba2 import FALCON_H1, GRANITE_HYBRID
from jcrosslora.checkpoint.family.mistral import MINISTRAL3, MISTRAL
from jcrosslora.checkpoint.family.mistral4 import MISTRAL4
from jcrosslora.checkpoint.family.mixtral import MIXTRAL
from jcrosslora.checkpoint.family.names import ATTENTION as ATTENTION
from jcrosslora.checkpoint.family.names import EMBEDDING as EMBEDDING
from jcrosslora.checkpoint.family.names import HEAD as HEAD
from jcrosslora.checkpoint.family.names import HEAD_BIAS as HEAD_BIAS
from jcrosslora.checkpoint.family.names import ROLE_PATHS as ROLE_PATHS
from jcrosslora.checkpoint.family.names import ROLES as ROLES
from jcrosslora.checkpoint.family.nemotron import NEMOTRON
from jcrosslora.checkpoint.family.nemotron_h import NEMOTRON_H
from jcrosslora.checkpoint.family.olmo import OLMO2, OLMO3, OLMOE
from jcrosslora.checkpoint.family.olmo_hybrid import OLMO_HYBRID
from jcrosslora.checkpoint.family.phi import PHI, PHI3, PHIMOE
from jcrosslora.checkpoint.family.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from jcrosslora.checkpoint.family.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from jcrosslora.checkpoint.family.record import Family as Family
from jcrosslora.checkpoint.family.seed_oss import SEED_OSS
from jcrosslora.checkpoint.family.smollm3 import SMOLLM3
from jcrosslora.checkpoint.family.starcoder2 import STARCODER2

_TABLE = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    SMOLLM3,
    MINISTRAL3,
    OLMO2,
    OLMO3,
    GRANITE,
    GLM,
    GLM4,
    COHERE,
    COHERE2,
    EXAONE4,
    SEED_OSS,
    HUNYUAN_V1_DENSE,
    GEMMA,
    STARCODER2,
    PHI,
    NEMOTRON,
    APERTUS,
    ARCEE,
    ERNIE4_5,
    LFM2,
    QWEN3_5,
    GRANITE_HYBRID,
    FALCON_H1,
    NEMOTRON_H,
    OLMO_HYBRID,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    GRANITEMOE,
    GLM4_MOE,
    GPT_OSS,
    DEEPSEEK_V3,
    DEEPSEEK_V2,
    MISTRAL4,
    QWEN2_MOE,
    EXAONE_MOE,
    ERNIE4_5_MOE,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    LFM2_MOE,
    PHIMOE,
    GEMMA4,
    GEMMA4_UNIFIED,
    LLAMA4,
    COHERE2_MOE,
    HUNYUAN_V1_MOE,
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _TABLE}

_GEMMA3N = (
    "gemma4_text",
    "four residual streams that predict each other (AltUp), learned low-rank residuals (LAuReL), and MLPs that keep "
    "only their largest features",
)
# model_type of models that cannot be read, alone or inside a multimodal one -> the family that each resembles, and what
# the decoder lacks for it.
UNSUPPORTED: Mapping[str, tuple[str, str]] = {
    "gemma3n": _GEMMA3N,
    "gemma3n_text": _GEMMA3N,
}
