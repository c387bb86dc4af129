"""Names of the modules and tensors of a model, the same in every family."""

from collections.abc import Mapping

DENSE_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARED = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")  # experts that all tokens go through
# Of latent attention: from the stream to the latents, and from these to queries, keys and values.
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
LATENT_INNER = ("q_b_proj", "kv_b_proj")
ROLES = (*DENSE_ROLES, *LATENT, *SHARED, "shared_expert_gate")

# Logical name of each role in a layer, the same in every family.
ROLE_PATHS: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    **{role: f"self_attn.{role}" for role in LATENT},
    **{role: f"mlp.shared_experts.{role.removeprefix('shared_')}" for role in SHARED},
    "shared_expert_gate": "mlp.shared_expert_gate",
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNGATED_MLP = ("up_proj", "down_proj")
