"""The supported families, and what is known of those that are not.

Sources: the modelling code of transformers 5 and the `config.json` files of published models. A key that is in no table
is refused (see `config.py`), because it may change what the weights mean.
"""

from collections.abc import Mapping

from jcrosslora.architectures.families.cohere_exaone import COHERE, COHERE2, COHERE2_MOE, EXAONE4, EXAONE_MOE
from jcrosslora.architectures.families.deepseek_glm import DEEPSEEK_V2, DEEPSEEK_V3, GLM, GLM4, GLM4_MOE, MISTRAL4
from jcrosslora.architectures.families.ernie_hunyuan import ERNIE4_5, ERNIE4_5_MOE, HUNYUAN_V1_DENSE, HUNYUAN_V1_MOE
from jcrosslora.architectures.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA4, GEMMA4_UNIFIED
from jcrosslora.architectures.families.lfm2 import LFM2, LFM2_MOE
from jcrosslora.architectures.families.llama import (
    APERTUS,
    ARCEE,
    GRANITE,
    GRANITEMOE,
    LLAMA,
    MINISTRAL3,
    MISTRAL,
    MIXTRAL,
    NEMOTRON,
    SEED_OSS,
    SMOLLM3,
    STARCODER2,
)
from jcrosslora.architectures.families.llama4 import LLAMA4
from jcrosslora.architectures.families.mamba2 import BAMBA, FALCON_H1, GRANITE_HYBRID
from jcrosslora.architectures.families.nemotron_h import NEMOTRON_H
from jcrosslora.architectures.families.olmo import OLMO2, OLMO3, OLMO_HYBRID, OLMOE
from jcrosslora.architectures.families.phi_gpt_oss import GPT_OSS, PHI, PHI3, PHIMOE
from jcrosslora.architectures.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_5, QWEN3_5_MOE, QWEN3_MOE, QWEN3_NEXT
from jcrosslora.architectures.family import Family

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
    BAMBA,
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
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}

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
