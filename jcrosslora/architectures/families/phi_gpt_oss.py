"""Phi and gpt-oss.

Phi 1 to 2 have parallel blocks; Phi 3 to 4 share the class of Phi 3; Phi 3.5 MoE has experts. gpt-oss has experts with
biases and a clamped activation, and attention sinks, so that a head may attend to nothing.
"""

from jcrosslora.architectures.architecture import attention, usual_layers
from jcrosslora.architectures.blocks import ATTENTION, QKV, UNGATED_MLP
from jcrosslora.architectures.config import Number, words
from jcrosslora.architectures.expert_rules import BIASES, FUSED, MERGED, ExpertRules
from jcrosslora.architectures.families.llama import MIXTRAL_EXPERTS
from jcrosslora.architectures.family import Family, Gguf, Positions, Windows, yarn

PHI = Family(
    name="phi",
    architectures=("PhiForCausalLM",),
    gguf=Gguf("phi2"),
    gated=False,
    fused={"self_attn.dense": ("o_proj",), "mlp.fc1": ("up_proj",), "mlp.fc2": ("down_proj",)},
    norms={"attn": "input_layernorm", "q": "self_attn.q_layernorm", "k": "self_attn.k_layernorm"},
    final_norm="model.final_layernorm",
    norm="layer",
    norm_biases=True,
    qk_norm_key="qk_layernorm",
    parallel=True,
    biases=(*ATTENTION, *UNGATED_MLP),
    head_bias=True,
    activation="gelu_new",
    eps=Number("layer_norm_eps", 1e-5),
    positions=Positions(share=0.5),
)
PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    gguf=Gguf("phi3"),
    fused={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("gate_proj", "up_proj")},
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    # The first releases call longrope "su" or "yarn".
    positions=Positions(share=1.0, outer_original=4096, aliases={"su": "longrope", "yarn": "longrope"}),
    keys=words("original_max_position_embeddings"),
    fixed=dict(
        attention_bias=(False,), mlp_bias=(False,), lm_head_bias=(False,), full_attn_mod=(1,), interpolate_factor=(1,)
    ),
)
_PHI_ROUTER = {"router": "mlp.router.weight"}

PHIMOE = Family(
    name="phimoe",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    norm="layer",
    norm_biases=True,
    bias_keys={"attention_bias": ATTENTION},
    head_bias="lm_head_bias",
    experts=ExpertRules(
        ("num_local_experts",),
        width="intermediate_size",
        layouts=(MIXTRAL_EXPERTS, FUSED | _PHI_ROUTER),
        scores="in turn",
        tolerance=Number("router_jitter_noise", 0.01),
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(theta=1_000_000.0, types=("longrope",)),
    keys=words("input_jitter_noise original_max_position_embeddings"),
    # Its class always uses two experts.
    fixed={"num_experts_per_tok": (2,)},
    defaults={"num_local_experts": 16, "num_experts_per_tok": 2},
)


_OSS_ROUTER = {"router": "mlp.router.weight", "router_bias": "mlp.router.bias"}
_STORED = _OSS_ROUTER | {
    "gate_up": "mlp.experts.gate_up_proj",
    "gate_up_bias": "mlp.experts.gate_up_proj_bias",
    "down": "mlp.experts.down_proj",
    "down_bias": "mlp.experts.down_proj_bias",
}
# In published files the matrices are MXFP4, in the usual order of rows and columns.
_PACKED = _STORED | {name: f"{_STORED[name]}_blocks" for name in ("gate_up", "down")}

GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    gguf=Gguf(
        "gpt-oss",
        names={"mlp": "post_attention_norm"},
        tensors={"attn_sinks.weight": "self_attn.sinks"},
        rope={"truncate": False},
    ),
    layers=lambda model: usual_layers(model, [attention(model, sinks=True)] * model.dims.layers),
    bias_keys={"attention_bias": ATTENTION},
    experts=ExpertRules(
        ("num_local_experts", "num_experts"),
        width="intermediate_size",
        layouts=(_PACKED, MERGED | _OSS_ROUTER | BIASES, _STORED),
        scores="chosen",
        transposed=frozenset({_STORED["gate_up"], _STORED["down"]}),
        interleaved=True,
        clamp=(Number("swiglu_alpha", 1.702), Number("swiglu_limit", 7.0)),
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=128, period=2),
    positions=Positions(theta=150_000.0, settings=yarn(32.0, 4096, 150_000.0, truncate=False)),
    # The class does not read them.
    keys=words("experts_per_token initial_context_length"),
    defaults={"head_dim": 64, "attention_bias": True},
)
