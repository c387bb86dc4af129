"""Arcee (AFM): Llama with a squared ReLU in place of a gate."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, UNGATED_MLP
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number

ARCEE = Family(
    name="arcee",
    architectures=("ArceeForCausalLM",),
    gguf=Gguf("arcee", permuted=True),
    roles=(*ATTENTION, *UNGATED_MLP),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": UNGATED_MLP},
    activation="relu2",
    eps=Number("rms_norm_eps", 1e-5),
    keys=words("attention_bias mlp_bias"),
)
