"""SmolLM3: Llama with each fourth layer without positions."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION, MLP
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Positions, Windows

SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    gguf=Gguf("smollm3", permuted=True),
    bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
    tied=True,
    windows=Windows(size=None, switch="use_sliding_window", which="unrotated"),
    positions=Positions(theta=2_000_000.0, unrotated="no_rope_layers"),
    # Its class has no `pretraining_tp`, which published configurations keep.
    keys=words(
        "attention_bias mlp_bias sliding_window use_sliding_window layer_types no_rope_layers no_rope_layer_interval "
        "pretraining_tp"
    ),
)
