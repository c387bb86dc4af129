"""Names of the modules and tensors of a model, the same in every family."""

from collections.abc import Mapping

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNGATED_MLP = ("up_proj", "down_proj")
DENSE_ROLES = (*ATTENTION, *MLP)
# "qg_proj" holds the rows of queries and of their gates in turn, head by head.
GATED_ATTENTION = ("qg_proj", *ATTENTION[1:])
# Of layers of full attention whose heads are not those of layers with windows.
GLOBAL_ATTENTION = ("global_q_proj", "global_k_proj", "global_v_proj", "global_o_proj")
# Queries of layers that read the keys and values of a layer before, without and with heads of their own.
KV_SHARED = ("kv_shared_q_proj", "global_kv_shared_q_proj")
WIDE_MLP = ("wide_gate_proj", "wide_up_proj", "wide_down_proj")
# Of the step behind the MLP that multiplies the stream with an input of the layer.
PER_LAYER = ("per_layer_input_gate", "per_layer_projection")
# Of latent attention: from the stream to the latents, and from these to queries, keys and values.
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
LATENT_INNER = ("q_b_proj", "kv_b_proj")
CONVOLUTION = ("conv_in_proj", "conv_out_proj")
DELTA = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "delta_out_proj")
# The same with queries, keys and values on their own.
SEPARATE_DELTA = ("delta_q_proj", "delta_k_proj", "delta_v_proj", *DELTA[1:])
# The same with the rows of one group of heads behind those of another.
GROUPED_DELTA = ("in_proj_qkvz", "in_proj_ba", "delta_out_proj")
MAMBA = ("mamba_in_proj", "mamba_out_proj")
SHARED = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")  # experts that all tokens go through
# From the stream to a small latent that experts read, and back from what they return.
EXPERT_LATENT = ("expert_in_proj", "expert_out_proj")
ROLES = (
    *("q_proj", "qg_proj", "kv_shared_q_proj", *ATTENTION[1:]),
    *(GLOBAL_ATTENTION[0], "global_kv_shared_q_proj", *GLOBAL_ATTENTION[1:]),
    *(*LATENT, *CONVOLUTION, *GROUPED_DELTA[:2], *SEPARATE_DELTA[:3], *DELTA, *MAMBA),
    *(*MLP, *WIDE_MLP, *SHARED, "shared_expert_gate", *EXPERT_LATENT, *PER_LAYER),
)
# Roles that write to the residual stream; the others read it, or what these get.
MIXER_WRITERS = ("o_proj", "global_o_proj", "conv_out_proj", "delta_out_proj", "mamba_out_proj")
MLP_WRITERS = ("down_proj", "wide_down_proj", "shared_down_proj", "expert_out_proj")
WRITERS = (*MIXER_WRITERS, *MLP_WRITERS, "per_layer_projection")

# Logical name of each role in a layer, the same in every family.
ROLE_PATHS: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "qg_proj": "self_attn.q_proj",
    **{role: f"self_attn.{role.removeprefix('global_')}" for role in GLOBAL_ATTENTION},
    **dict.fromkeys(KV_SHARED, "self_attn.q_proj"),
    "conv_in_proj": "conv.in_proj",
    "conv_out_proj": "conv.out_proj",
    **{role: f"linear_attn.{role.removeprefix('delta_')}" for role in SEPARATE_DELTA[:3]},
    "in_proj_qkvz": "linear_attn.in_proj_qkvz",
    "in_proj_ba": "linear_attn.in_proj_ba",
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
    **{role: f"mlp.{role.removeprefix('wide_')}" for role in WIDE_MLP},
    **{role: role for role in PER_LAYER},
    **{role: f"self_attn.{role}" for role in LATENT},
    **{role: f"mlp.shared_experts.{role.removeprefix('shared_')}" for role in SHARED},
    "shared_expert_gate": "mlp.shared_expert_gate",
    "expert_in_proj": "mlp.fc1_latent_proj",
    "expert_out_proj": "mlp.fc2_latent_proj",
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
# Of the inputs that each layer has beside the stream: an embedding of (V, layers * features), a projection of the
# stream before the first layer, and the norm of its output.
LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
LAYER_INPUT_PROJECTION = "model.per_layer_model_projection.weight"
LAYER_INPUT_NORM = "model.per_layer_projection_norm.weight"
