"""Mistral and Ministral 3: Llama with sliding windows in all layers; Ministral's queries grow with the position."""

from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions, Windows

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    windows=Windows(listed=False),
    keys=frozenset({"sliding_window", "layer_types"}),
)
MINISTRAL3 = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM",),
    gguf=Gguf("mistral3", permuted=True),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(
        grows=True,
        settings={
            "rope_type": "yarn",
            "rope_theta": 1_000_000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16_384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    keys=frozenset({"sliding_window", "layer_types"}),
    defaults={"head_dim": 128},
)
