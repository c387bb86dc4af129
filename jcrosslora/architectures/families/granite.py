"""Granite, dense and with experts: Llama with a factor on embedding, on what blocks add, on scores and on logits."""

from functools import partial

from jcrosslora.architectures.expert_rules import MERGED, ExpertRules
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.keys import words
from jcrosslora.architectures.names import ATTENTION, MLP
from jcrosslora.architectures.rules import Gguf
from jcrosslora.architectures.sizes import Number

_BLOCK = "block_sparse_moe"
PUBLISHED = {
    "router": f"{_BLOCK}.router.layer.weight",
    "gate_up": f"{_BLOCK}.input_linear.weight",
    "down": f"{_BLOCK}.output_linear.weight",
}
IN_MEMORY = {
    "router": f"{_BLOCK}.router.weight",
    "gate_up": f"{_BLOCK}.experts.gate_up_proj",
    "down": f"{_BLOCK}.experts.down_proj",
}
# Metadata keys of the factors.
FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_KEYS = words("attention_bias embedding_multiplier attention_multiplier residual_multiplier logits_scaling")

_granite = partial(
    Family,
    embedding_scale=Number("embedding_multiplier", 1.0),
    attn_scale=Number("attention_multiplier", 1.0),
    residual_scale=Number("residual_multiplier", 1.0),
    logit_scale=Number("logits_scaling", 1.0, power=-1.0),
)

GRANITE = _granite(
    name="granite",
    architectures=("GraniteForCausalLM",),
    gguf=Gguf("granite", permuted=True, numbers=FACTORS),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
    keys=_KEYS | {"mlp_bias"},
)
GRANITEMOE = _granite(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    gguf=Gguf("granitemoe", permuted=True, numbers=FACTORS),
    bias_keys={"attention_bias": ATTENTION},
    experts=ExpertRules(
        ("num_local_experts",), width="intermediate_size", layouts=(PUBLISHED, MERGED, IN_MEMORY), scores="chosen"
    ),
    keys=_KEYS | words("num_local_experts num_experts_per_tok output_router_logits router_aux_loss_coef"),
)
