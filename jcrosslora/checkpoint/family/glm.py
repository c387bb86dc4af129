"""GLM-4, and GLM-4-0414 (`glm4`): half of each head is rotated, by neighbouring features; gate and up are fused."""

from functools import partial

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import QKV
from jcrosslora.checkpoint.family.record import PRE_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions

_glm = partial(
    Family,
    fused={"mlp.gate_up_proj": ("gate_proj", "up_proj")},
    bias_keys={"attention_bias": QKV},
    eps=Number("rms_norm_eps", 1.5625e-7),
    positions=Positions(share=0.5, interleaved=True),
    keys=words("attention_bias partial_rotary_factor"),
    defaults={"head_dim": 128, "attention_bias": True},
)

GLM = _glm(name="glm", architectures=("GlmForCausalLM",))
GLM4 = _glm(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    gguf=Gguf("glm4"),
    norms=PRE_NORMS | {"attn_post": "post_self_attn_layernorm", "mlp_post": "post_mlp_layernorm"},
)
