"""GLM-4, and GLM-4-0414 (`glm4`): half of each head is rotated, by neighbouring features; gate and up are fused.

GLM-4.5 to 4.7 (`glm4_moe`) have experts behind the first layers, and rotate features half a head apart.
"""

from functools import partial

from jcrosslora.architectures.expert_rules import (
    CORRECTION,
    FUSED,
    MERGED,
    PUBLISHED,
    ExpertRules,
    behind_first,
    shared_width,
)
from jcrosslora.architectures.family import PRE_NORMS, QK_NORMS, Family
from jcrosslora.architectures.keys import words
from jcrosslora.architectures.names import QKV
from jcrosslora.architectures.rules import Gguf, Positions
from jcrosslora.architectures.sizes import Number

_glm = partial(
    Family,
    fused={"mlp.gate_up_proj": ("gate_proj", "up_proj")},
    bias_keys={"attention_bias": QKV},
    eps=Number("rms_norm_eps", 1.5625e-7),
    positions=Positions(share=0.5, interleaved=True),
    keys=words("attention_bias partial_rotary_factor"),
    defaults={"head_dim": 128, "attention_bias": True},
)

GLM = _glm(name="glm", architectures=("GlmForCausalLM",))
GLM4 = _glm(
    name="glm4",
    architectures=("Glm4ForCausalLM",),
    gguf=Gguf("glm4"),
    norms=PRE_NORMS | {"attn_post": "post_self_attn_layernorm", "mlp_post": "post_mlp_layernorm"},
)
GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    gguf=Gguf(
        "glm4moe",
        names={"mlp": "post_attention_norm"},
        counts={"n_shared_experts": "expert_shared_count", "first_k_dense_replace": "leading_dense_block_count"},
    ),
    norms=PRE_NORMS | QK_NORMS,
    qk_norm_key="use_qk_norm",
    bias_keys={"attention_bias": QKV},
    experts=ExpertRules(
        ("n_routed_experts", "num_experts", "num_local_experts"),
        layouts=(PUBLISHED | CORRECTION, MERGED | CORRECTION, FUSED | CORRECTION),
        scores="sigmoid",
        normalised="norm_topk_prob",
        scale=Number("routed_scaling_factor", 1.0),
        groups=("n_group", "topk_group"),
        layers=behind_first("first_k_dense_replace"),
        shared=shared_width("n_shared_experts"),
    ),
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(share=0.5),
    keys=words(
        "attention_bias partial_rotary_factor use_qk_norm first_k_dense_replace n_routed_experts num_experts "
        "num_local_experts n_shared_experts num_experts_per_tok moe_intermediate_size norm_topk_prob n_group "
        "topk_group routed_scaling_factor num_nextn_predict_layers output_router_logits router_aux_loss_coef"
    ),
    defaults={"first_k_dense_replace": 1, "n_shared_experts": 1, "norm_topk_prob": True},
)
