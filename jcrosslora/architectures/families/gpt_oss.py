"""gpt-oss: experts with biases and a clamped activation, and heads that may attend to nothing (attention sinks)."""

from jcrosslora.architectures.architecture import attention, usual_layers
from jcrosslora.architectures.expert_rules import BIASES, MERGED, ExpertRules
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.keys import words
from jcrosslora.architectures.names import ATTENTION
from jcrosslora.architectures.rules import Gguf, Positions, Windows
from jcrosslora.architectures.sizes import Number

_ROUTER = {"router": "mlp.router.weight", "router_bias": "mlp.router.bias"}
_STORED = _ROUTER | {
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
        used="num_experts_per_tok",
        width="intermediate_size",
        layouts=(_PACKED, MERGED | _ROUTER | BIASES, _STORED),
        scores="chosen",
        transposed=frozenset({_STORED["gate_up"], _STORED["down"]}),
        interleaved=True,
        clamp=(Number("swiglu_alpha", 1.702), Number("swiglu_limit", 7.0)),
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=128, period=2),
    positions=Positions(
        theta=150_000.0,
        settings={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    # Beside what is read, keys of published configurations that the class does not read.
    keys=words(
        "attention_bias sliding_window layer_types num_local_experts num_experts num_experts_per_tok experts_per_token "
        "swiglu_alpha swiglu_limit output_router_logits router_aux_loss_coef initial_context_length"
    ),
    defaults={"head_dim": 64, "attention_bias": True},
)
