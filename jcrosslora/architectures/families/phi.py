"""Phi 1 to 2, whose blocks are parallel, Phi 3 to 4, whose class is Phi 3's, and Phi 3.5 with experts."""

from jcrosslora.architectures.expert_rules import FUSED, ExpertRules
from jcrosslora.architectures.families.mistral import MIXTRAL_EXPERTS
from jcrosslora.architectures.family import Family
from jcrosslora.architectures.keys import words
from jcrosslora.architectures.names import ATTENTION, QKV, UNGATED_MLP
from jcrosslora.architectures.rules import Gguf, Positions, Windows
from jcrosslora.architectures.sizes import Number

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
    keys=frozenset({"layer_norm_eps", "qk_layernorm", "partial_rotary_factor"}),
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
    keys=frozenset({"sliding_window", "original_max_position_embeddings", "partial_rotary_factor"}),
    fixed={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
    },
)
_ROUTER = {"router": "mlp.router.weight"}

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
        layouts=(MIXTRAL_EXPERTS, FUSED | _ROUTER),
        scores="in turn",
        tolerance=Number("router_jitter_noise", 0.01),
    ),
    eps=Number("rms_norm_eps", 1e-5),
    windows=Windows(size=None, listed=False),
    positions=Positions(theta=1_000_000.0, types=("longrope",)),
    keys=words(
        "sliding_window layer_types attention_bias lm_head_bias num_local_experts router_jitter_noise "
        "input_jitter_noise output_router_logits router_aux_loss_coef original_max_position_embeddings"
    ),
    # Its class chooses two, whatever is stated.
    fixed={"num_experts_per_tok": (2,)},
    defaults={"num_local_experts": 16, "num_experts_per_tok": 2},
)
