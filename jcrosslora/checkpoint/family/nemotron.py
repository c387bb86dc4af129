"""Nemotron 3 and 4 and Minitron: layer norms of gain 1 + weight, half of each head rotated, squared ReLU, no gate."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, UNGATED_MLP
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions

NEMOTRON = Family(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    gguf=Gguf("nemotron"),
    roles=(*ATTENTION, *UNGATED_MLP),
    norm="layer",
    norm_biases=True,
    gain_offset=1.0,
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": UNGATED_MLP},
    activation="relu2",
    eps=Number("norm_eps", 1e-5),
    positions=Positions(share=0.5),
    keys=words("attention_bias mlp_bias norm_eps partial_rotary_factor"),
)
