"""OLMo 2 and 3: norms behind attention and MLP alone, and of all heads of queries and keys together; OLMoE."""

from functools import partial

from jcrosslora.checkpoint.family.experts import FUSED, MERGED, PUBLISHED, Experts, in_all_layers
from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION
from jcrosslora.checkpoint.family.record import POST_NORMS, PRE_NORMS, QK_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions, Windows

_olmo = partial(
    Family,
    norms=POST_NORMS | QK_NORMS,
    qk_norms="whole",
    bias_keys={"attention_bias": ATTENTION},
    eps=Number("rms_norm_eps", 1e-5),
)

OLMO2 = _olmo(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    gguf=Gguf("olmo2"),
    keys=words("attention_bias"),
)
OLMO3 = _olmo(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    gguf=Gguf("olmo2"),
    windows=Windows(period=4),
    # Its class reads `rope_theta` for the layers of full attention alone.
    positions=Positions(theta=500_000.0, local_theta=500_000.0),
    keys=words("attention_bias sliding_window layer_types"),
)
OLMOE = _olmo(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    gguf=Gguf("olmoe", implied={"norm_topk_prob": False}),
    roles=ATTENTION,
    norms=PRE_NORMS | QK_NORMS,
    parts=in_all_layers,
    experts=Experts(
        ("num_experts", "num_local_experts"),
        width="intermediate_size",
        layouts=(PUBLISHED, MERGED, FUSED),
        normalised="norm_topk_prob",
    ),
    keys=words(
        "attention_bias num_experts num_local_experts num_experts_per_tok norm_topk_prob output_router_logits "
        "router_aux_loss_coef"
    ),
    fixed={"clip_qkv": (None,)},
)
