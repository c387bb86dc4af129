"""Seed-OSS: Llama with biases of its own in attention."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import MLP, QKV
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf

SEED_OSS = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    gguf=Gguf("seed_oss", names={"mlp": "post_attention_norm"}),
    bias_keys={"attention_bias": QKV, "attention_out_bias": ("o_proj",), "mlp_bias": MLP},
    keys=words("attention_bias attention_out_bias mlp_bias residual_dropout"),
    fixed={"pretraining_tp": (1,)},
    defaults={"head_dim": 128, "attention_bias": True},
)
