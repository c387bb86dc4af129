"""Tiny random models of the families with mixers beside attention, with settings that are awkward for each."""

MAMBA = {"mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_d_conv": 3}
GRANITE = MAMBA | {
    "hidden_size": 40,
    "mamba_n_heads": 8,
    "num_hidden_layers": 5,
    "num_local_experts": 0,
    "shared_intermediate_size": 44,
    "layer_types": ["mamba", "mamba", "attention", "mamba", "attention"],
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 5.0,
}
FALCON = MAMBA | {"mamba_d_ssm": 24, "head_dim": 12, "time_step_limit": [0.1, 0.9]}
NEMOTRON = {
    "head_dim": 12,
    "layers_block_type": ["mamba", "mlp", "mamba", "moe", "attention", "mlp", "mamba", "moe"],
    "mamba_num_heads": 6,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 5,
    "conv_kernel": 3,
    "chunk_size": 8,
    "time_step_limit": [0.1, 0.9],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 20,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DELTA = {
    "num_hidden_layers": 5,
    "head_dim": 16,
    "full_attention_interval": 3,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

# The last layers read the keys and values of the layers before them.
GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": [*["sliding_attention", "sliding_attention", "full_attention"] * 2],
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "head_dim": 12,
    "global_head_dim": 20,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 64,
    "sliding_window": 6,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 100.0},
        "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
    },
}
PER_LAYER = ["per_layer_input_gate", "per_layer_projection"]

# Modules for peft where it does not take all linear ones: it refuses Falcon's out_proj, and takes the modules of an MLP
# for those of experts.
TARGETS = {
    "falcon_h1": [*ATTENTION, "in_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3_next": [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"],
    "qwen3_5_moe": [*ATTENTION, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"],
    "granite-experts": [*ATTENTION, "in_proj", "out_proj", "input_linear", "output_linear"],
    "gemma4": [*ATTENTION, *PER_LAYER, "gate_proj", "up_proj", "down_proj"],
    "gemma4-experts": ATTENTION,
    "lfm2_moe": [*ATTENTION[:3], "in_proj", "out_proj", "w1", "w2", "w3"],
}
TARGETS["falcon_h1-norm"] = TARGETS["falcon_h1"]
# Shared experts and dense layers of Llama 4; its router is a linear module too.
TARGETS |= {f"llama4{end}": [*ATTENTION, "gate_proj", "up_proj", "down_proj"] for end in ("", "-plain", "-dense")}
TARGETS["nemotron_h"] = [*ATTENTION, "in_proj", "up_proj", "down_proj"]
TARGETS["nemotron_h-latent"] = [*TARGETS["nemotron_h"], "fc1_latent_proj", "fc2_latent_proj"]
TARGETS["nemotron_h-dense"] = TARGETS["nemotron_h"]

# Name -> (model_type, settings beyond those of `dense_models.COMMON`).
HYBRIDS = {
    "gemma4": ("gemma4_text", GEMMA4),
    # The kinds of layers and the rotary settings are those that the class takes where it is told nothing.
    "gemma4-unified": (
        "gemma4_unified_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "attention_bias": True,
            "sliding_window": 6,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": False,
            "use_bidirectional_attention": "vision",
        },
    ),
    "gemma4-experts": (
        "gemma4_text",
        GEMMA4
        | {
            "attention_k_eq_v": True,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        DELTA | EXPERTS | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [3], "norm_topk_prob": False},
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", DELTA | EXPERTS | {"shared_expert_intermediate_size": 20}),
    "granite-experts": (
        "granitemoehybrid",
        GRANITE | {"num_local_experts": 5, "num_experts_per_tok": 2, "position_embedding_type": "rope"},
    ),
    "lfm2_moe": (
        "lfm2_moe",
        EXPERTS
        | {
            "num_hidden_layers": 5,
            "num_dense_layers": 2,
            "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
            "conv_L_cache": 4,
            "routed_scaling_factor": 1.7,
        },
    ),
    "lfm2": (
        "lfm2",
        {
            "num_hidden_layers": 5,
            "full_attn_idxs": [1, 4],
            "conv_L_cache": 4,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.3,
            "tie_word_embeddings": False,
        },
    ),
    "lfm2-bias": (
        "lfm2",
        {
            "layer_types": ["full_attention", "conv"],
            "conv_bias": True,
            "block_auto_adjust_ff_dim": False,
            "block_ff_dim": 24,
        },
    ),
    "qwen3_5": ("qwen3_5_text", DELTA | {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "qwen3_5-bias": (
        "qwen3_5_text",
        DELTA
        | {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "linear_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    # Sizes of heads that follow from those of the model, and an epsilon that the norm of the mixer does not have.
    "olmo_hybrid": ("olmo_hybrid", {"num_hidden_layers": 5, "rms_norm_eps": 1e-2, "attention_bias": True}),
    # An activation that the gate of the mixer does not have.
    "olmo_hybrid-nope": (
        "olmo_hybrid",
        {
            "head_dim": 12,
            "hidden_act": "gelu",
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "num_hidden_layers": 4,
            "linear_conv_kernel_dim": 3,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_allow_neg_eigval": False,
            "rope_parameters": {"rope_theta": None, "rope_type": "default"},
            "tie_word_embeddings": True,
        },
    ),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "nemotron_h-latent": (
        "nemotron_h",
        NEMOTRON
        | {"moe_latent_size": 20, "mlp_bias": True, "use_bias": True, "use_conv_bias": False, "num_experts_per_tok": 4}
        | {"layers_block_type": ["moe", "mamba", "moe", "attention"], "norm_topk_prob": False}
        | {"time_step_limit": [0.6, 0.8]},
    ),
    "nemotron_h-dense": (
        "nemotron_h",
        {name: value for name, value in NEMOTRON.items() if "expert" not in name}
        | {"layers_block_type": ["mamba", "mlp", "mamba", "mlp", "attention", "mlp"]},
    ),
    "granite-bias": ("granitemoehybrid", GRANITE | {"position_embedding_type": "rope", "attention_bias": True}),
    "granite-nope": ("granitemoehybrid", GRANITE | {"mamba_conv_bias": False, "mamba_proj_bias": True}),
    "bamba": (
        "bamba",
        MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 8},
    ),
    "falcon_h1": (
        "falcon_h1",
        FALCON
        | {
            "attention_in_multiplier": 0.7,
            "attention_out_multiplier": 0.6,
            "embedding_multiplier": 2.5,
            "key_multiplier": 0.4,
            "lm_head_multiplier": 0.3,
            "mlp_multipliers": [0.8, 1.4],
            "ssm_in_multiplier": 1.3,
            "ssm_multipliers": [0.5, 1.5, 2.0, 0.7, 1.2],
            "ssm_out_multiplier": 0.9,
        },
    ),
    "falcon_h1-norm": (
        "falcon_h1",
        FALCON
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "projectors_bias": True,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "tie_word_embeddings": True,
        },
    ),
}
