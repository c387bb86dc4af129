"""Settings of tiny models with experts, in the form of `dense_models.VARIANTS`, awkward for each class."""

COUNTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
SPARSE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
GROUPED = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
SHORT = YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}
# Queries grow three times within the texts of the tests.
GROWING = {"original_max_position_embeddings": 6, "llama_4_scaling_beta": 0.5}

LATENT = GROUPED | {
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 7,
    "num_key_value_heads": 4,
}

# Wide enough for experts to score nearly as high as the best.
PHI = {"num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 0.4}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Chunks and steps of the growth of queries end at different places, inside the sequences of the tests.
LLAMA4 = COUNTS | {
    "head_dim": 12,
    "intermediate_size": 20,
    "intermediate_size_mlp": 44,
    "attention_chunk_size": 6,
    "floor_scale": 4,
    "attn_scale": 0.5,
}

# As in North Mini Code: a dense layer of full attention with positions in front, and then three that slide.
COHERE2 = {
    "head_dim": 12,
    "num_hidden_layers": 5,
    "intermediate_size": 12,
    "prefix_dense_intermediate_size": 20,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "sliding_window": 6,
    "logit_scale": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"],
    "mlp_layer_types": ["dense", *["sparse"] * 4],
}
HUNYUAN = {
    "head_dim": 12,
    "num_experts": 6,
    "moe_topk": [3, 3],
    "intermediate_size": 20,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
}

EXPERT_VARIANTS = {
    "mixtral": ("mixtral", COUNTS | {"head_dim": 12, "sliding_window": 6}),
    "qwen3_moe": ("qwen3_moe", SPARSE | {"head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe-mixed": (
        "qwen3_moe",
        SPARSE
        | {
            "head_dim": 12,
            "num_hidden_layers": 5,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    "olmoe-normed": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 4, "norm_topk_prob": True}),
    "granitemoe": (
        "granitemoe",
        COUNTS
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 5.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "glm4_moe": ("glm4_moe", GROUPED | {"head_dim": 12, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe-plain": (
        "glm4_moe",
        GROUPED | {"head_dim": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "first_k_dense_replace": 0},
    ),
    "gpt_oss": (
        "gpt_oss",
        COUNTS | {"head_dim": 12, "num_hidden_layers": 3, "sliding_window": 6, "rope_parameters": SHORT},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT
        | {"q_lora_rank": 12, "attention_bias": True, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v3-direct": ("deepseek_v3", LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT
        | {"q_lora_rank": 12, "attention_bias": True, "mlp_bias": True, "topk_method": "group_limited_greedy"}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    # Groups do not count without the choice that has them.
    "deepseek_v2-direct": ("deepseek_v2", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
    "mistral4": (
        "mistral4",
        LATENT
        | {"q_lora_rank": 12, "attention_bias": True}
        | {"rope_parameters": YARN | GROWING | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "mistral4-direct": (
        "mistral4",
        LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "exaone_moe": (
        "exaone_moe",
        SPARSE
        | {"head_dim": 12, "num_hidden_layers": 4, "sliding_window": 6, "num_shared_experts": 2}
        | {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "routed_scaling_factor": 1.7},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 12, "num_hidden_layers": 4}
        | {"moe_layer_start_index": 1, "moe_layer_interval": 2, "tie_word_embeddings": False},
    ),
    "phimoe": ("phimoe", PHI | {"sliding_window": 6, "attention_bias": True, "lm_head_bias": True}),
    "phimoe-long": (
        "phimoe",
        PHI
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.5, 2.0, 3.0],
                "long_factor": [2.0, 3.0, 4.0, 6.0],
                "short_mscale": 1.2,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        SPARSE | {"shared_expert_intermediate_size": 20, "num_hidden_layers": 3, "decoder_sparse_step": 2},
    ),
    "llama4": (
        "llama4_text",
        LLAMA4 | {"num_hidden_layers": 5, "interleave_moe_layer_step": 2, "rope_parameters": LLAMA3},
    ),
    # No norms, no growth, and other layers without positions, some of which see their chunk alone.
    "llama4-plain": (
        "llama4_text",
        LLAMA4
        | {
            "num_hidden_layers": 4,
            "moe_layers": [0, 1, 3],
            "no_rope_layers": [1, 0, 0, 1],
            "layer_types": ["full_attention", "chunked_attention", "full_attention", "chunked_attention"],
            "num_experts_per_tok": 1,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
        },
    ),
    # Shared experts are averaged, weights are sigmoids that do not sum to 1, norms have root mean squares.
    "cohere2_moe": (
        "cohere2_moe",
        COHERE2
        | {
            "num_shared_experts": 2,
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": False,
            "rms_norm_eps": 0.05,
            "attention_bias": True,
        },
    ),
    # Shared experts are added, weights sum to 1, and full attention has positions in no dense layer, one of them behind
    # experts.
    "cohere2_moe-sum": (
        "cohere2_moe",
        COHERE2
        | {
            "num_shared_experts": 1,
            "shared_expert_combination_strategy": "sum",
            "expert_selection_fn": "sigmoid",
            "prefix_dense_sliding_window_pattern": 2,
            "prefix_dense_intermediate_size": None,
            "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"],
            "layer_norm_eps": 0.05,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        },
    ),
    # No shared experts, a softmax over the chosen ones, and kinds of layers by their periods.
    "cohere2_moe-routed": (
        "cohere2_moe",
        COHERE2
        | {
            "layer_types": None,
            "mlp_layer_types": None,
            "first_k_dense_replace": 2,
            "prefix_dense_sliding_window_pattern": 1,
            "sliding_window_pattern": 3,
            "norm_topk_prob": False,
        },
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", HUNYUAN | {"attention_bias": True}),
    "hunyuan_v1_moe-plain": (
        "hunyuan_v1_moe",
        HUNYUAN
        | {
            "moe_topk": 1,
            "tie_word_embeddings": True,
            "rms_norm_eps": 0.05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    # Layers with positions and those without are in one program; no chunks.
    "llama4-dense": (
        "llama4_text",
        LLAMA4
        | {
            "num_hidden_layers": 3,
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": None,
            "tie_word_embeddings": True,
        },
    ),
}
