"""Configurations of published models are accepted; settings that may change the meaning of weights are refused."""

from pathlib import Path

import pytest
from checkpoint_files import CONFIG

from jcrosslora.architectures.config import COMMON_KEYS, HARMLESS_KEYS
from jcrosslora.architectures.families import UNSUPPORTED
from jcrosslora.checkpoint import FAMILIES, check_config, open_base, read_dims
from jcrosslora.errors import CheckpointError

PATH = Path("config.json")
LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def sizes(hidden, intermediate, layers, heads, kv, vocab, **more) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        **more,
    }


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "pretraining_tp": 1}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "attention_dropout": 0.0}
PHI3 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "original_max_position_embeddings": 4096,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
}
GEMMA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rope_theta": 10000.0,
    "cache_implementation": "hybrid",
}
LONG = {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"}

# Name -> (config.json as on the hub, expected head_dim).
PUBLISHED = {
    "Llama-2-7b": (LLAMA | sizes(4096, 11008, 32, 32, 32, 32000, rope_scaling=None, _name_or_path="x/y"), 128),
    "Llama-1 without kv heads": (
        {k: v for k, v in (LLAMA | sizes(4096, 11008, 32, 32, 0, 32000)).items() if k != "num_key_value_heads"},
        128,
    ),
    "Llama-3.2-1B": (
        LLAMA
        | sizes(2048, 8192, 16, 32, 8, 128256, head_dim=64, mlp_bias=False, attention_bias=False)
        | {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0, "tie_word_embeddings": True},
        64,
    ),
    "SmolLM2-135M": (
        LLAMA
        | sizes(576, 1536, 30, 9, 3, 49152, is_llama_config=True, rope_interleaved=False, rope_theta=100000)
        | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "tie_word_embeddings": True},
        64,
    ),
    "unsloth copy": (LLAMA | sizes(2048, 8192, 16, 32, 8, 128256, unsloth_fixed=True, unsloth_version="2025.1"), 64),
    "Mistral-7B-v0.1": (MISTRAL | sizes(4096, 14336, 32, 32, 8, 32000, sliding_window=4096, rope_theta=1e4), 128),
    "Mistral-7B-v0.3": (MISTRAL | sizes(4096, 14336, 32, 32, 8, 32768, sliding_window=None, rope_theta=1e6), 128),
    "Mistral-Nemo": (MISTRAL | sizes(5120, 14336, 40, 32, 8, 131072, head_dim=128), 128),
    "Qwen2.5-0.5B": (
        QWEN2
        | sizes(896, 4864, 24, 14, 2, 151936, max_window_layers=21, sliding_window=32768, use_sliding_window=False)
        | {"use_mrope": False, "rope_theta": 1000000.0, "tie_word_embeddings": True},
        64,
    ),
    "Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128}
        | sizes(1024, 3072, 28, 16, 8, 151936, max_window_layers=28, sliding_window=None, use_sliding_window=False),
        128,
    ),
    "gemma-2-2b": (
        {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 256, "sliding_window": 4096}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        | GEMMA
        | sizes(2304, 9216, 26, 8, 4, 256000),
        256,
    ),
    "gemma-3-1b": (
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000, "rope_scaling": None}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | GEMMA
        | sizes(1152, 6912, 26, 4, 1, 262144),
        256,
    ),
    "gemma-3-270m": (
        {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256}
        | {"_sliding_window_pattern": 6, "layer_types": ["sliding_attention"] * 18, "rope_local_base_freq": 10000.0}
        | {"sliding_window": 512, "use_bidirectional_attention": False, "dtype": "bfloat16"}
        | GEMMA
        | sizes(640, 2048, 18, 4, 1, 262144),
        256,
    ),
    "gemma-3-4b": (
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            "eos_token_id": [1, 106],
            "initializer_range": 0.02,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
        },
        256,
    ),
    "Phi-3-mini-4k": (PHI3 | sizes(3072, 8192, 32, 32, 32, 32064, sliding_window=2047, rope_scaling=None), 96),
    "Phi-3.5-mini": (
        PHI3 | sizes(3072, 8192, 32, 32, 32, 32064, rope_scaling=LONG, attention_bias=False, sliding_window=262144),
        96,
    ),
    "Phi-4-mini": (
        PHI3
        | sizes(3072, 8192, 32, 24, 8, 200064, rope_scaling=LONG, partial_rotary_factor=0.75, sliding_window=262144)
        | {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1}
        | {"interpolate_factor": 1, "tie_word_embeddings": True},
        128,
    ),
}

NO_EPS = {"rms_norm_eps": None}
DYNAMIC = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "type": "dynamic"}
PUBLISHED |= {
    "SmolLM3-3B": (
        {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_act": "silu", "pretraining_tp": 2}
        | sizes(2048, 11008, 36, 16, 4, 128256, attention_bias=False, mlp_bias=False, rope_theta=5000000.0)
        | {"no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "layer_types": ["full_attention"] * 36}
        | {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "rope_scaling": None},
        128,
    ),
    "OLMo-2-1124-7B": (
        {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_act": "silu", "attention_bias": False}
        | sizes(4096, 11008, 32, 32, 32, 100352, rope_theta=500000, rope_scaling=None),
        128,
    ),
    "granite-3.3-2b": (
        {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "hidden_act": "silu", "mlp_bias": False}
        | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
        | sizes(2048, 8192, 40, 32, 8, 49159, residual_multiplier=0.22, attention_bias=False, rope_theta=1e7),
        64,
    ),
    "GLM-4-9B-0414": (
        {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "hidden_act": "silu", "attention_bias": False}
        | sizes(4096, 13696, 40, 32, 2, 151552, head_dim=128, partial_rotary_factor=0.5, rope_theta=10000.0),
        128,
    ),
    "Command R7B": (
        {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "hidden_act": "silu", "layer_switch": 4}
        | {"layer_norm_eps": 1e-05, "logit_scale": 0.25, "order_of_interleaved_layers": "local_attn_first"}
        | {"position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "use_embedding_sharing": True}
        | {"use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True}
        | {"use_qk_norm": False, "cache_implementation": "hybrid", "attention_bias": False}
        | sizes(4096, 14336, 32, 32, 8, 256000, head_dim=128, sliding_window=4096, rope_theta=50000)
        | NO_EPS,
        128,
    ),
    "EXAONE-4.0-32B": (
        {"architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "hidden_act": "silu"}
        | {"sliding_window_pattern": "LLLG", "layer_types": ["sliding_attention"] * 63 + ["full_attention"]}
        | sizes(5120, 27392, 64, 40, 8, 102400, sliding_window=4096, head_dim=128, rope_scaling=LLAMA3_SCALING),
        128,
    ),
    "Seed-OSS-36B": (
        {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "hidden_act": "silu", "mlp_bias": False}
        | {"attention_bias": True, "attention_out_bias": False, "residual_dropout": 0.1, "pretraining_tp": 1}
        | {"attention_dropout": 0.1, "rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0}
        | sizes(5120, 27648, 64, 80, 8, 155136, head_dim=128),
        128,
    ),
    "Hunyuan-7B": (
        {"architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense", "hidden_act": "silu"}
        | {"add_classification_head": False, "attention_bias": False, "attention_head_dim": 128, "class_num": 0}
        | {"cla_share_factor": 2, "dense_list": [4096, 0], "eod_token_id": 3, "mlp_bias": False, "norm_type": "rms"}
        | {"org_vocab_size": 128167, "pad_id": 127961, "pool_type": "last", "pretraining_tp": 1, "use_cla": False}
        | {"use_qk_norm": True, "use_rotary_pos_emb": True, "rope_scaling": DYNAMIC, "rope_theta": 10000.0}
        | sizes(4096, 14336, 32, 32, 8, 128167, head_dim=128),
        128,
    ),
    "Gemma-7b": (
        {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu", "attention_bias": False}
        | {"hidden_activation": None, "rope_theta": 10000.0, "rope_scaling": None}
        | sizes(3072, 24576, 28, 16, 16, 256000, head_dim=256),
        256,
    ),
    "starcoder2-3b": (
        {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh"}
        | {"embedding_dropout": 0.1, "residual_dropout": 0.1, "mlp_type": "default", "norm_epsilon": 1e-05}
        | {"norm_type": "layer_norm", "sliding_window": 4096, "use_bias": True, "rope_theta": 999999.4420358813}
        | sizes(3072, 12288, 30, 24, 2, 49152)
        | NO_EPS,
        128,
    ),
    "phi-2": (
        {"architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new", "qk_layernorm": False}
        | {"layer_norm_eps": 1e-05, "partial_rotary_factor": 0.4, "embd_pdrop": 0.0, "resid_pdrop": 0.1}
        | sizes(2560, 10240, 32, 32, 32, 51200, rope_theta=10000.0, rope_scaling=None)
        | NO_EPS,
        80,
    ),
    "Minitron-4B": (
        {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "hidden_act": "relu2", "mlp_bias": False}
        | {"norm_eps": 1e-05, "partial_rotary_factor": 0.5, "attention_bias": False, "head_dim": 128}
        | sizes(3072, 9216, 32, 24, 8, 256000, rope_theta=10000.0)
        | NO_EPS,
        128,
    ),
    "Apertus-8B": (
        {"architectures": ["ApertusForCausalLM"], "model_type": "apertus", "hidden_act": "xielu", "mlp_bias": False}
        | {"attention_bias": False, "post_norm": False, "qk_norm": True, "rope_theta": 12000000}
        | sizes(4096, 21504, 32, 32, 8, 131072, rope_scaling=LLAMA3_SCALING),
        128,
    ),
}


QWEN_LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "full_attention_interval": 4,
    "head_dim": 256,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}
GEMMA4 = {
    "attention_bias": False,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": 262144,
}
PHI_LONG = LONG | {"long_mscale": 1.24, "short_mscale": 1.24, "original_max_position_embeddings": 4096}
PUBLISHED |= {
    "Qwen3-Next-80B-A3B": (
        {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_act": "silu"}
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "partial_rotary_factor": 0.25}
        | sizes(2048, 5120, 48, 16, 2, 151936, num_experts=512, num_experts_per_tok=10, rope_theta=10000000)
        | QWEN_LINEAR,
        256,
    ),
    "Qwen3.5-35B-A3B": (
        {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "image_token_id": 248056,
            "video_token_id": 248057,
            "vision_start_token_id": 248053,
            "vision_end_token_id": 248054,
            "text_config": {key: value for key, value in sizes(2048, 0, 40, 16, 2, 248320).items() if value != 0}
            | {"model_type": "qwen3_5_moe_text", "attn_output_gate": True, "num_experts": 256, "num_experts_per_tok": 8}
            | {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
            | QWEN_LINEAR,
            "vision_config": {"hidden_size": 1152, "model_type": "qwen3_5_moe"},
        },
        256,
    ),
    "gemma-4-E2B": (
        {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "audio_config": {"model_type": "gemma4_audio"},
            "audio_token_id": 258881,
            "boa_token_id": 256000,
            "eoa_token_index": 258883,
            "text_config": sizes(1536, 6144, 35, 8, 1, 262144, final_logit_softcapping=30.0, sliding_window=512)
            | GEMMA4
            | {"model_type": "gemma4_text", "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7}
            | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 256}
            | {"attention_k_eq_v": False, "enable_moe_block": False, "num_global_key_value_heads": None},
            "vision_config": {"model_type": "gemma4_vision"},
        },
        256,
    ),
    "gemma-4-26B-A4B": (
        {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "audio_config": None,
            "text_config": sizes(2816, 2112, 30, 16, 8, 262144, final_logit_softcapping=30.0, sliding_window=1024)
            | GEMMA4
            | {"model_type": "gemma4_text", "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5}
            | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
            | {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "enable_moe_block": True}
            | {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
            "vision_config": {"model_type": "gemma4_vision"},
        },
        256,
    ),
    "LFM2-8B-A1B": (
        {"architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "conv_L_cache": 3, "conv_bias": False}
        | {"layer_types": (["conv"] * 3 + ["full_attention"]) * 6, "norm_eps": 1e-05, "norm_topk_prob": True}
        | {"moe_intermediate_size": 1792, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4}
        | {"routed_scaling_factor": 1.0, "use_expert_bias": True, "use_pos_enc": True, "rope_theta": 1000000.0}
        | sizes(2048, 7168, 24, 32, 8, 65536)
        | NO_EPS,
        64,
    ),
    # The settings by which its converter writes models without positions.
    "Olmo-Hybrid-7B": (
        {"architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid", "hidden_act": "silu"}
        | {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8, "linear_allow_neg_eigval": True}
        | {"linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_conv_kernel_dim": 4}
        | {"linear_key_head_dim": 96, "linear_value_head_dim": 192, "attention_bias": False, "rope_theta": None}
        | sizes(3840, 11008, 32, 30, 30, 100352),
        128,
    ),
    "granite-4.0-h-tiny": (
        {"architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "hidden_act": "silu"}
        | {"layer_types": (["mamba"] * 9 + ["attention"]) * 4, "mamba_n_heads": 48, "mamba_d_head": 64}
        | {"mamba_d_state": 128, "num_local_experts": 64, "num_experts_per_tok": 6, "shared_intermediate_size": 1024}
        | {"attention_multiplier": 0.0078125, "embedding_multiplier": 12, "logits_scaling": 6, "init_method": "mup"}
        | {"position_embedding_type": "nope", "normalization_function": "rmsnorm", "residual_multiplier": 0.22}
        | sizes(1536, 512, 40, 12, 4, 100352, tie_word_embeddings=True),
        128,
    ),
    "Llama-4-Scout": (
        {
            "architectures": ["Llama4ForConditionalGeneration"],
            "model_type": "llama4",
            "boi_token_index": 200080,
            "eoi_token_index": 200081,
            "image_token_index": 200092,
            "tie_word_embeddings": False,
            "text_config": {"model_type": "llama4_text", "head_dim": 128, "hidden_act": "silu", "attention_bias": False}
            | {"attention_chunk_size": 8192, "for_llm_compressor": False, "no_rope_layers": [], "use_qk_norm": True}
            | {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 16384, "output_router_logits": False}
            | {"num_experts_per_tok": 1, "num_local_experts": 16, "router_jitter_noise": 0.0, "rope_theta": 500000.0}
            | {
                "router_aux_loss_coef": 0.001,
                "rope_scaling": LLAMA3_SCALING | {"factor": 16.0, "high_freq_factor": 1.0},
            }
            | {"attn_scale": 0.1, "attn_temperature_tuning": 4, "floor_scale": 8192}
            | sizes(5120, 8192, 48, 40, 8, 202048),
            "vision_config": {"model_type": "llama4_vision_model"},
        },
        128,
    ),
    "MobileLLM-R1-140M": (
        {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "head_dim": 64, "hidden_act": "silu"}
        | {"attention_chunk_size": 32768, "attn_scale": 0.1, "attn_temperature_tuning": False, "floor_scale": 8192}
        | {"interleave_moe_layer_step": 0, "intermediate_size_mlp": 2048, "moe_layers": [], "no_rope_layers": [1] * 15}
        | {"num_experts_per_tok": 0, "num_local_experts": 0, "rope_theta": 8e6, "use_qk_norm": True}
        | sizes(576, 2048, 15, 9, 3, 128256, tie_word_embeddings=True),
        64,
    ),
    "North-Mini-Code": (
        {"architectures": ["Cohere2MoeForCausalLM"], "model_type": "cohere2_moe", "hidden_act": "silu"}
        | {"first_k_dense_replace": 1, "prefix_dense_intermediate_size": 3072, "num_experts": 128}
        | {"prefix_dense_sliding_window_pattern": 1, "num_experts_per_tok": 8, "num_shared_experts": 0}
        | {"expert_selection_fn": "sigmoid", "norm_topk_prob": False, "layer_norm_eps": 1e-05, "logit_scale": 1.0}
        | {"use_parallel_block": True, "use_gated_activation": True, "use_qk_norm": False, "attention_bias": False}
        | {"layer_types": ["full_attention", *["sliding_attention"] * 3] * 12 + ["full_attention"]}
        | sizes(2048, 768, 49, 32, 4, 262144, head_dim=128, sliding_window=4096, rope_theta=50000, rms_norm_eps=1e-06),
        128,
    ),
    "Hunyuan-A13B": (
        {"architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "hidden_act": "silu"}
        | {"add_classification_head": False, "attention_bias": False, "attention_head_dim": 128, "class_num": 0}
        | {"cla_share_factor": 2, "dense_list": [4096, 0], "eod_token_id": 3, "mlp_bias": False, "norm_type": "rms"}
        | {"group_limited_greedy": False, "moe_drop_tokens": False, "moe_layer_num_skipped": 0, "use_mla": False}
        | {"moe_intermediate_size": [3072] * 32, "moe_topk": [8] * 32, "num_shared_expert": [1] * 32}
        | {"moe_random_routing_dropped_token": False, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
        | {"num_experts": 64, "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_rotary_pos_emb": True}
        | {"org_vocab_size": 128167, "pad_id": 127961, "pool_type": "last", "pretraining_tp": 1, "use_cla": False}
        | sizes(4096, 3072, 32, 32, 8, 128167, rope_scaling=DYNAMIC | {"alpha": 1000.0}, rope_theta=10000.0),
        128,
    ),
    "Phi-3.5-MoE": (
        {"architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "hidden_act": "silu", "attention_bias": True}
        | {"lm_head_bias": True, "num_local_experts": 16, "num_experts_per_tok": 2, "router_jitter_noise": 0.01}
        | {"input_jitter_noise": 0.01, "router_aux_loss_coef": 0.0, "original_max_position_embeddings": 4096}
        | sizes(4096, 6400, 32, 32, 8, 32064, rope_scaling=PHI_LONG, sliding_window=131072, rope_theta=10000.0),
        128,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_accepted(name: str):
    config, head_dim = PUBLISHED[name]
    checked = check_config(config, PATH)
    dims = read_dims(checked, PATH)
    assert dims.head_dim == head_dim
    assert dims.hidden == config.get("text_config", config)["hidden_size"]
    assert bool(checked.names.prefixes) == ("text_config" in config)


def test_a_multimodal_text_config_gets_its_defaults():
    checked = check_config(PUBLISHED["gemma-3-4b"][0], PATH)
    dims = read_dims(checked, PATH)
    assert (dims.heads, dims.kv_heads, dims.vocab) == (8, 4, 262208)
    assert checked.values["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("SmolLM2-135M", {"rope_interleaved": True}, "'rope_interleaved'=True is not supported for llama"),
        ("Llama-2-7b", {"pretraining_tp": 2}, "'pretraining_tp'=2 is not supported for llama: expected 1"),
        ("Llama-2-7b", {"sliding_window": 512}, "'sliding_window'=512 is not known for llama"),
        ("Llama-2-7b", {"hidden_act": 3}, "'hidden_act'=3 is not the name"),
        ("Llama-2-7b", {"attention_multiplier": 0.1}, "remove it from config.json"),
        ("Llama-2-7b", {"foo": "x" * 500}, r"'foo'='x+\.\.\. is not known"),
        ("Qwen2.5-0.5B", {"dual_chunk_attention_config": {"chunk_size": 1}}, "'dual_chunk_attention_config'"),
        ("Qwen2.5-0.5B", {"use_mrope": True}, "'use_mrope'=True"),
        ("Qwen3-0.6B", {"num_experts": 8}, "'num_experts'=8"),
        ("gemma-3-270m", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'=True"),
        ("gemma-3-4b", {"audio_config": {"x": 1}}, "'audio_config'={'x': 1} is not known for gemma3"),
        ("gemma-3-4b", {"text_config": None}, "text_config"),
        ("gemma-3-4b", {"text_config": {"model_type": "llama"}}, "text_config"),
        ("Phi-4-mini", {"lm_head_bias": True}, "'lm_head_bias'=True"),
        ("Phi-4-mini", {"mlp_bias": True}, "'mlp_bias'=True"),
        ("Phi-4-mini", {"architectures": ["Phi4MMForCausalLM"]}, "Phi4MMForCausalLM"),
        ("Phi-4-mini", {"architectures": "Phi3ForCausalLM"}, "architectures"),
    ],
)
def test_settings_that_change_the_meaning_of_weights_are_refused(name: str, change: dict, message: str):
    with pytest.raises(CheckpointError, match=message) as error:
        check_config(PUBLISHED[name][0] | change, PATH)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("empty", [None, False, {}, []])
def test_an_unknown_key_without_a_value_is_harmless(empty):
    check_config(CONFIG | {"something_new": empty}, PATH)


def test_the_steps_of_state_space_layers_may_be_unbounded():
    config = {"model_type": "nemotron_h", "hybrid_override_pattern": "M*", **sizes(64, 96, 2, 4, 2, 32)}
    check_config(
        config | {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "time_step_limit": [0.0, float("inf")]},
        PATH,
    )


@pytest.mark.parametrize("value", [0, 0.0, "", True, 1])
def test_an_unknown_key_with_a_value_is_refused(value):
    with pytest.raises(CheckpointError, match="'something_new'"):
        check_config(CONFIG | {"something_new": value}, PATH)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_the_family_table_is_consistent(family):
    known = {"attn", "attn_post", "mlp", "mlp_post", "q", "k", "q_a", "kv_a"}
    assert set(family.norms) <= known | {"mlp_alone", "experts_in", "experts_out", "per_layer_out"}
    roles = {linear.role for block in family.all_blocks for linear in block.LINEARS}
    assert ("q" in family.norms) == ("k" in family.norms)
    assert {role for held in family.fused.values() for role in held} <= roles
    assert {role for held in family.bias_keys.values() for role in held} <= roles
    assert not set(family.fixed) & (COMMON_KEYS | HARMLESS_KEYS | family.keys)
    assert not family.keys & (COMMON_KEYS | HARMLESS_KEYS)
    assert set(family.bias_keys) <= family.known_keys
    numbers = ("eps", "attn_scale", "residual_scale", "logit_scale", "attn_soft_cap", "final_soft_cap")
    stated = [number for name in numbers if (number := getattr(family, name)) is not None]
    assert {number.key for number in stated if number.key} <= family.known_keys | COMMON_KEYS
    assert family.name not in UNSUPPORTED


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_a_family_that_is_refused_is_named_with_what_is_missing(model_type: str):
    like, lacks = UNSUPPORTED[model_type]
    assert like in FAMILIES
    with pytest.raises(CheckpointError, match=f"'{model_type}' is not supported: it is like {like}, but") as error:
        check_config(CONFIG | {"model_type": model_type}, PATH)
    assert lacks in str(error.value)


def test_public_names_of_the_package():
    assert callable(open_base)
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "phi"} <= set(FAMILIES)
