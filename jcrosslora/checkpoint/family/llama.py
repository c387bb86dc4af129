"""Llama 1 to 3, and models of its class such as SmolLM2."""

from jcrosslora.checkpoint.family.names import ATTENTION, MLP
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
    keys=frozenset({"attention_bias", "mlp_bias"}),
    fixed={"pretraining_tp": (1,), "rope_interleaved": (False,)},
)
