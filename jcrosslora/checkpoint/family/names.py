"""Names of the modules and tensors of a model, the same in every family."""

from collections.abc import Mapping

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNGATED_MLP = ("up_proj", "down_proj")
DENSE_ROLES = (*ATTENTION, *MLP)
# "qg_proj" holds the rows of queries and of their gates in turn, head by head.
GATED_ATTENTION = ("qg_proj", *ATTENTION[1:])
CONVOLUTION = ("conv_in_proj", "conv_out_proj")
DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "delta_out_proj")
MAMBA = ("mamba_in_proj", "mamba_out_proj")
ROLES = ("q_proj", "qg_proj", *ATTENTION[1:], *CONVOLUTION, *DELTA, *MAMBA, *MLP)
# Roles that write to the residual stream; the others read it, or what these get.
MIXER_WRITERS = ("o_proj", "conv_out_proj", "delta_out_proj", "mamba_out_proj")
WRITERS = (*MIXER_WRITERS, "down_proj")

# Logical name of each role in a layer, the same in every family.
ROLE_PATHS: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "qg_proj": "self_attn.q_proj",
    "conv_in_proj": "conv.in_proj",
    "conv_out_proj": "conv.out_proj",
    "in_proj_qkv": "linear_attn.in_proj_qkv",
    "in_proj_z": "linear_attn.in_proj_z",
    "in_proj_b": "linear_attn.in_proj_b",
    "in_proj_a": "linear_attn.in_proj_a",
    "delta_out_proj": "linear_attn.out_proj",
    "mamba_in_proj": "mamba.in_proj",
    "mamba_out_proj": "mamba.out_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
