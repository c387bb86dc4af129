"""Tiny bases of the families that quantised checkpoints with other scales of channels exist of."""

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 2,
}
GROUPED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = GROUPED | {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
CASES = {
    "llama": ("llama", {}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_next": ("qwen3_next", MOE | DELTA | {"shared_expert_intermediate_size": 32}),
    "olmo2": ("olmo2", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "olmo3": ("olmo3", {}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "starcoder2": ("starcoder2", {}),
    "mixtral": ("mixtral", LOCAL),
    "qwen2_moe": ("qwen2_moe", MOE | {"shared_expert_intermediate_size": 32}),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", MOE | DELTA | {"shared_expert_intermediate_size": 32}),
    "olmo_hybrid": ("olmo_hybrid", {key: value for key, value in DELTA.items() if "interval" not in key}),
    "gpt_oss": (
        "gpt_oss",
        LOCAL | {"sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "deepseek_v2": ("deepseek_v2", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", LATENT | {"q_lora_rank": 32}),
    "lfm2": ("lfm2", {"full_attn_idxs": [1, 3], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}),
    "bamba": (
        "bamba",
        {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2}
        | {"mamba_d_state": 8, "mamba_d_conv": 3},
    ),
    "gemma4": (
        "gemma4_text",
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 16, "sliding_window": 16}
        | {"num_global_key_value_heads": 2, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "llama4": ("llama4_text", LOCAL | {"intermediate_size_mlp": 96, "attention_chunk_size": 16}),
    "glm4_moe": ("glm4_moe", GROUPED | {"use_qk_norm": True}),
}
