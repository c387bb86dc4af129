"""ERNIE 4.5 (dense): Llama that rotates neighbouring features."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, MLP
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions

ERNIE4_5 = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    gguf=Gguf("ernie4_5"),
    bias_keys={"use_bias": (*ATTENTION, *MLP)},
    tied=True,
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(theta=500_000.0, interleaved=True),
    keys=words("use_bias"),
    fixed={"compression_ratio": (1.0,)},
    defaults={"head_dim": 128},
)
