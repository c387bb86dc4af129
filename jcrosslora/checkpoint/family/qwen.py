"""Qwen2 and Qwen3."""

from jcrosslora.checkpoint.family.names import ATTENTION, QKV
from jcrosslora.checkpoint.family.record import PRE_NORMS, QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, Windows

_WINDOWS = Windows(switch="use_sliding_window", first=("max_window_layers", 28))
_KEYS = frozenset({"sliding_window", "layer_types", "use_sliding_window"})

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf=Gguf("qwen2"),
    biases=QKV,
    windows=_WINDOWS,
    keys=_KEYS,
)
QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf=Gguf("qwen3"),
    norms=PRE_NORMS | QK_NORMS,
    bias_keys={"attention_bias": ATTENTION},
    windows=_WINDOWS,
    keys=_KEYS | {"attention_bias"},
    defaults={"head_dim": 128},
)
