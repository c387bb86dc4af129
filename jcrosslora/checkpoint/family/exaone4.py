"""EXAONE 4: norms behind attention and MLP alone; with windows, layers of full attention have no positions."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.record import POST_NORMS, QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions, Windows

EXAONE4 = Family(
    name="exaone4",
    architectures=("Exaone4ForCausalLM",),
    gguf=Gguf("exaone4"),
    norms=POST_NORMS | QK_NORMS,
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(period=4, period_keys=("sliding_window_pattern",)),
    positions=Positions(unrotated="full beside windows"),
    keys=words("sliding_window sliding_window_pattern layer_types"),
)
