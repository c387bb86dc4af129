"""Mixtral: Mistral with experts in all layers."""

from jcrosslora.checkpoint.family.experts import FUSED, MERGED, Experts, in_all_layers
from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION
from jcrosslora.checkpoint.family.record import Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions, Windows

_BLOCK = "block_sparse_moe"
PUBLISHED = {
    "router": f"{_BLOCK}.gate.weight",
    "gate": f"{_BLOCK}.experts.{{}}.w1.weight",
    "up": f"{_BLOCK}.experts.{{}}.w3.weight",
    "down": f"{_BLOCK}.experts.{{}}.w2.weight",
}

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    gguf=Gguf("llama", permuted=True),
    roles=ATTENTION,
    parts=in_all_layers,
    experts=Experts(
        ("num_local_experts", "num_experts"), width="intermediate_size", layouts=(PUBLISHED, MERGED, FUSED)
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(theta=1_000_000.0),
    keys=words(
        "sliding_window layer_types num_local_experts num_experts num_experts_per_tok output_router_logits "
        "router_aux_loss_coef router_jitter_noise"
    ),
)
