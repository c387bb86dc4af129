"""Granite: Llama with a factor on the embedding, on what each block adds, on attention scores and on logits."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, MLP
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    gguf=Gguf(
        "granite",
        permuted=True,
        numbers={
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
    embedding_scale=Number("embedding_multiplier", 1.0),
    attn_scale=Number("attention_multiplier", 1.0),
    residual_scale=Number("residual_multiplier", 1.0),
    logit_scale=Number("logits_scaling", 1.0, power=-1.0),
    keys=words("attention_bias mlp_bias embedding_multiplier attention_multiplier residual_multiplier logits_scaling"),
)
