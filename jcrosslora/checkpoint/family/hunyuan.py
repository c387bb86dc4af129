"""Hunyuan V1 (dense): Llama whose queries and keys are normalised behind the rotation."""

from jcrosslora.checkpoint.family.keys import words
from jcrosslora.checkpoint.family.names import ATTENTION
from jcrosslora.checkpoint.family.record import PRE_NORMS, Family
from jcrosslora.checkpoint.family.rules import Gguf, Number, Positions

HUNYUAN_V1_DENSE = Family(
    name="hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    gguf=Gguf("hunyuan-dense"),
    norms=PRE_NORMS | {"q": "self_attn.query_layernorm", "k": "self_attn.key_layernorm"},
    qk_norms="rotated",
    bias_keys={"attention_bias": ATTENTION},
    eps=Number("rms_norm_eps", 1e-5),
    positions=Positions(types=("dynamic",)),
    # Beside `attention_bias`, keys of published configurations that the class does not read.
    keys=words(
        "attention_bias attention_head_dim cla_share_factor class_num dense_list eod_token_id im_end_id im_newline_id "
        "im_start_id mask_init_id org_vocab_size pad_id pool_type text_end_id text_start_id"
    ),
    fixed={
        "add_classification_head": (False,),
        "mlp_bias": (False,),
        "norm_type": ("rms", "hf_rms"),
        "num_experts": (1,),
        "pretraining_tp": (1,),
        "use_cla": (False,),
        "use_qk_norm": (True,),
        "use_rotary_pos_emb": (True,),
    },
)
