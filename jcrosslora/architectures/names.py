"""Names that all families share: groups of roles, and tensors outside the layers."""

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
# "qg_proj" holds the rows of queries and of their gates in turn, head by head.
GATED_ATTENTION = ("qg_proj", *ATTENTION[1:])
MLP = ("gate_proj", "up_proj", "down_proj")
UNGATED_MLP = ("up_proj", "down_proj")
DENSE_ROLES = (*ATTENTION, *MLP)
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
CONVOLUTION = ("conv_in_proj", "conv_out_proj")
MAMBA = ("mamba_in_proj", "mamba_out_proj")
SHARED = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")  # experts that all tokens go through
# From the stream to a small latent that experts read, and back from what they return.
EXPERT_LATENT = ("expert_in_proj", "expert_out_proj")

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
# Of the inputs that each layer has beside the stream: an embedding of (V, layers * features), a projection of the
# stream before the first layer, and the norm of its output.
LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
LAYER_INPUT_PROJECTION = "model.per_layer_model_projection.weight"
LAYER_INPUT_NORM = "model.per_layer_projection_norm.weight"
