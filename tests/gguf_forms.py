"""Tiny random models as GGUF: names of the gguf package, and the changes of llama.cpp's converter."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from dense_models import FOUR, MINISTRAL, random_model
from expert_models import COHERE2, COUNTS, GROUPED, GROWING, HUNYUAN, LATENT, SHORT, SPARSE, YARN
from gguf_files import gguf, permute, write_gguf
from hybrid_models import DELTA, EXPERTS, GEMMA4, GRANITE, NEMOTRON

NAMES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
SLIDING = [True, True, True, False]
ACTIVATION = ("alpha_p", "alpha_n", "beta", "eps")


@dataclass(frozen=True)
class Form:
    """A model in torch, and what llama.cpp's converter makes of it beside the tensors' names.

    Attributes:
        family: its model_type.
        arch: `general.architecture`.
        settings: of the model.
        metadata: beside what all files have.
        permuted: whether rows of q and k are reordered.
        offset: what is added to the weights of norms.
        rotated: pairs of a head of full attention that are rotated, where tensors state it.
        named_as: architecture with the same names of tensors, where the gguf package does not know this one.
    """

    family: str
    arch: str
    settings: dict
    metadata: dict = field(default_factory=dict)
    permuted: bool = False
    offset: float = 0.0
    rotated: int | None = None
    named_as: str | None = None


FORMS = {
    "smollm3": Form("smollm3", "smollm3", {"num_hidden_layers": 4}, permuted=True),
    "ministral3": Form(
        "ministral3",
        "mistral3",
        {"head_dim": 12, "rope_parameters": MINISTRAL},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 8,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.5,
        },
        permuted=True,
    ),
    "olmo2": Form("olmo2", "olmo2", {}),
    "olmo3": Form("olmo3", "olmo2", FOUR, {"attention.sliding_window": 6, "attention.sliding_window_pattern": SLIDING}),
    "granite": Form(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 5.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {"embedding_scale": 3.0, "attention.scale": 0.2, "residual_scale": 0.3, "logit_scale": 5.0},
        permuted=True,
    ),
    "glm4": Form("glm4", "glm4", {"head_dim": 12}, {"rope.dimension_count": 6}),
    "cohere": Form("cohere", "command-r", {"logit_scale": 0.3}, {"logit_scale": 0.3, "rope.scaling.type": "none"}),
    "cohere2": Form(
        "cohere2",
        "cohere2",
        FOUR | {"logit_scale": 0.3},
        {"logit_scale": 0.3, "attention.sliding_window": 6, "rope.scaling.type": "none"},
    ),
    "exaone4": Form(
        "exaone4", "exaone4", FOUR, {"attention.sliding_window": 6, "attention.sliding_window_pattern": SLIDING}
    ),
    "exaone4-full": Form("exaone4", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "seed_oss": Form("seed_oss", "seed_oss", {"head_dim": 12}),
    "hunyuan": Form(
        "hunyuan_v1_dense",
        "hunyuan-dense",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
        },
        {"rope.freq_base": 100.0 * 50.0**1.2, "rope.scaling.type": "none"},
    ),
    "gemma": Form("gemma", "gemma", {"head_dim": 12}, offset=1.0),
    "starcoder2": Form("starcoder2", "starcoder2", {}),
    "phi": Form("phi", "phi2", {"partial_rotary_factor": 0.5}, {"rope.dimension_count": 4}),
    "apertus": Form("apertus", "apertus", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "arcee": Form("arcee", "arcee", {"head_dim": 12}, permuted=True),
    "ernie4_5": Form("ernie4_5", "ernie4_5", {"head_dim": 12}),
    "nemotron": Form("nemotron", "nemotron", {}, {"rope.dimension_count": 4}, offset=1.0),
}


_MOE = {"expert_count": 5, "expert_used_count": 2}
_WIDE = {"expert_feed_forward_length": 12}
_SHARED = {"expert_shared_feed_forward_length": 20}
_GROUPED = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
    "expert_shared_count": 2,
    "leading_dense_block_count": 1,
    "expert_gating_func": 2,
    "expert_weights_scale": 1.7,
    "expert_weights_norm": True,
} | _WIDE
# Sizes that llama.cpp runs: heads of keys and values alike in the delta rule.
_DELTA = DELTA | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
_OF_DELTA = {
    "ssm.conv_kernel": 3,
    "ssm.state_size": 8,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 6,
    "ssm.inner_size": 48,
    "attention.recurrent_layers": [True, True, False, True, True],
    "rope.dimension_count": 4,
}
_QWEN = {"rope.dimension_sections": [1, 1, 0, 0]}
_LFM2 = {
    "num_hidden_layers": 5,
    "layer_types": ["conv", "full_attention", "conv", "conv", "full_attention"],
    "conv_L_cache": 4,
}
_OF_LFM2 = {"shortconv.l_cache": 4, "attention.head_count_kv": [0, 2, 0, 0, 2]}
_GRANITE = GRANITE | {"position_embedding_type": "nope", "num_experts_per_tok": 0, "intermediate_size": 44}
_SCALES = {"embedding_scale": 3.0, "attention.scale": 0.2, "residual_scale": 0.3, "logit_scale": 5.0}
_OF_GRANITE = _SCALES | {
    "ssm.conv_kernel": 3,
    "ssm.state_size": 5,
    "ssm.group_count": 2,
    "ssm.inner_size": 80,
    "ssm.time_step_rank": 8,
    "rope.scaling.finetuned": False,
    "expert_shared_feed_forward_length": 44,
    "attention.head_count_kv": [0, 0, 2, 0, 2],
}
_OF_LATENT = _GROUPED | {
    "attention.head_count_kv": 1,
    "attention.kv_lora_rank": 10,
    "attention.key_length": 18,
    "attention.value_length": 10,
    "attention.key_length_mla": 14,
    "attention.value_length_mla": 7,
    "rope.dimension_count": 8,
}
# Of DeepSeek V2, which has no groups unless `topk_method` says so, and of Mistral 4, whose converter says nothing of
# scores.
_OF_V2 = {key: value for key, value in _OF_LATENT.items() if key != "expert_weights_norm"} | {"expert_gating_func": 1}
_ONE_GROUP = {"expert_group_count": 1, "expert_group_used_count": 1}
_OF_MISTRAL4 = {key: value for key, value in _OF_LATENT.items() if key != "expert_gating_func"}
_OF_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}
_MSCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}
# Files state neither limits of the time step nor the width of an MLP that no layer has: the class has its defaults.
_NEMOTRON = {key: value for key, value in NEMOTRON.items() if key != "time_step_limit"} | {"layer_norm_epsilon": 1e-3}
_OF_NEMOTRON = {
    "ssm.conv_kernel": 3,
    "ssm.state_size": 5,
    "ssm.group_count": 2,
    "ssm.inner_size": 24,
    "ssm.time_step_rank": 6,
    "rope.scaling.finetuned": False,
}
_OF_NEMOTRON_EXPERTS = (
    _OF_NEMOTRON
    | _WIDE
    | _SHARED
    | {
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_shared_count": 1,
        "expert_group_count": 4,
        "expert_group_used_count": 2,
        "expert_weights_scale": 1.7,
        "expert_weights_norm": True,
        "attention.layer_norm_rms_epsilon": 1e-3,
    }
)
_LLAMA4 = {"num_hidden_layers": 5, "head_dim": 12, "intermediate_size": 20, "intermediate_size_mlp": 44}
_OF_LLAMA4 = {"feed_forward_length": 44, "expert_feed_forward_length": 20}
# The bounds of Llama 4 Scout, between which no pair of features is.
NO_TRANSITION = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
# Linear scaling of positions in layers with windows is nothing that files state.
_GEMMA4 = GEMMA4 | {
    "rope_parameters": GEMMA4["rope_parameters"] | {"sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
    "final_logit_softcapping": 3.0,
}
_OF_GEMMA4 = {
    "attention.shared_kv_layers": 3,
    "attention.sliding_window": 6,
    "attention.sliding_window_pattern": [True, True, False] * 2,
    "attention.key_length": 20,
    "attention.value_length": 20,
    "attention.key_length_swa": 12,
    "attention.value_length_swa": 12,
    "embedding_length_per_layer_input": 6,
    "feed_forward_length": [40, 40, 40, 80, 80, 80],
    "rope.freq_base_swa": 50.0,
    "rope.dimension_count": 20,
    "rope.dimension_count_swa": 12,
    "final_logit_softcapping": 3.0,
}

# Experts are wider or narrower than a dense MLP, whose width is `feed_forward_length`.
_OF_COHERE2 = {
    "logit_scale": 0.3,
    "feed_forward_length": 20,
    "expert_feed_forward_length": 12,
    "expert_count": 6,
    "expert_used_count": 3,
    "expert_gating_func": 2,
    "expert_weights_norm": False,
    "leading_dense_block_count": 1,
    "attention.sliding_window": 6,
    "attention.sliding_window_pattern": [False, True, True, True, False],
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": 12,
    "rope.scaling.type": "none",
}

# Families with experts, with several kinds of attention, with mixers beside attention, and with both.
SPARSE_FORMS = {
    "mixtral": Form("mixtral", "llama", COUNTS | {"head_dim": 12}, _MOE, permuted=True),
    "qwen3_moe": Form(
        "qwen3_moe",
        "qwen3moe",
        SPARSE | {"head_dim": 12, "norm_topk_prob": True},
        _WIDE | {"expert_count": 6, "expert_used_count": 3},
    ),
    "qwen2_moe": Form(
        "qwen2_moe",
        "qwen2moe",
        SPARSE | {"shared_expert_intermediate_size": 20, "norm_topk_prob": False},
        _WIDE | _SHARED | {"expert_count": 6, "expert_used_count": 3},
    ),
    "olmoe": Form("olmoe", "olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 4}, _MOE),
    "granitemoe": Form(
        "granitemoe",
        "granitemoe",
        COUNTS
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 5.0,
        },
        _MOE | _SCALES,
        permuted=True,
    ),
    "glm4_moe": Form(
        "glm4_moe",
        "glm4moe",
        GROUPED | {"head_dim": 12, "use_qk_norm": True, "attention_bias": True, "norm_topk_prob": True},
        _GROUPED | {"rope.dimension_count": 6},
    ),
    "gpt_oss": Form(
        "gpt_oss",
        "gpt-oss",
        COUNTS | {"head_dim": 12, "num_hidden_layers": 3, "sliding_window": 6, "rope_parameters": SHORT},
        _MOE
        | {"expert_feed_forward_length": 40}
        | {
            "attention.sliding_window": 6,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        },
    ),
    "deepseek_v3": Form(
        "deepseek_v3",
        "deepseek2",
        LATENT | {"q_lora_rank": 12, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
        _OF_LATENT
        | {
            "attention.q_lora_rank": 12,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_log_multiplier": 0.07,
        },
    ),
    "deepseek_v3-direct": Form(
        "deepseek_v3",
        "deepseek2",
        LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
        {key: value for key, value in _OF_LATENT.items() if "group" not in key},
    ),
    "deepseek_v2": Form(
        "deepseek_v2",
        "deepseek2",
        LATENT
        | {"q_lora_rank": 12, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
        _OF_V2 | _ONE_GROUP | _OF_YARN | {"attention.q_lora_rank": 12, "rope.scaling.yarn_log_multiplier": 0.07},
    ),
    "deepseek_v2-direct": Form(
        "deepseek_v2",
        "deepseek2",
        LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        {key: value for key, value in _OF_V2.items() if "group" not in key and key != "expert_gating_func"},
    ),
    "deepseek_v2-groups": Form(
        "deepseek_v2",
        "deepseek2",
        LATENT | {"q_lora_rank": 12, "topk_method": "group_limited_greedy"},
        _OF_V2 | {"attention.q_lora_rank": 12},
    ),
    "mistral4": Form(
        "mistral4",
        "mistral4",
        LATENT | {"q_lora_rank": 12, "rope_parameters": YARN | _MSCALES | {"llama_4_scaling_beta": 0.1}},
        _OF_MISTRAL4 | _OF_YARN | {"attention.q_lora_rank": 12, "rope.scaling.yarn_log_multiplier": 0.1},
    ),
    # The converter does not write how queries grow, but llama.cpp reads it.
    "mistral4-growing": Form(
        "mistral4",
        "mistral4",
        LATENT
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
        | {"rope_parameters": YARN | _MSCALES | GROWING},
        {key: value for key, value in _OF_MISTRAL4.items() if key != "expert_weights_norm"}
        | _ONE_GROUP
        | _OF_YARN
        | {
            "rope.scaling.original_context_length": 6,
            "rope.scaling.yarn_log_multiplier": 0.1,
            "attention.temperature_scale": 0.5,
            "attention.temperature_length": 6,
        },
    ),
    "nemotron_h": Form(
        "nemotron_h",
        "nemotron_h",
        {name: value for name, value in _NEMOTRON.items() if "expert" not in name}
        | {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mlp"]},
        _OF_NEMOTRON | {"attention.head_count_kv": [0, 0, 0, 2, 0], "feed_forward_length": [0, 40, 0, 0, 40]},
        permuted=True,
    ),
    "nemotron_h-experts": Form(
        "nemotron_h",
        "nemotron_h_moe",
        _NEMOTRON | {"layers_block_type": ["mamba", "moe", "attention", "mamba", "moe"], "intermediate_size": 12},
        _OF_NEMOTRON_EXPERTS | {"attention.head_count_kv": [0, 0, 2, 0, 0], "feed_forward_length": [0, 12, 0, 0, 12]},
        permuted=True,
    ),
    "nemotron_h-latent": Form(
        "nemotron_h",
        "nemotron_h_moe",
        _NEMOTRON
        | {"layers_block_type": ["moe", "mamba", "attention", "moe"], "norm_topk_prob": False}
        | {"moe_latent_size": 20, "n_group": 1, "topk_group": 1, "intermediate_size": 12},
        _OF_NEMOTRON_EXPERTS
        | _ONE_GROUP
        | {"attention.head_count_kv": [0, 0, 2, 0], "feed_forward_length": [12, 0, 0, 12]}
        | {"moe_latent_size": 20, "expert_weights_norm": False},
        permuted=True,
    ),
    "nemotron_h-biases": Form(
        "nemotron_h",
        "nemotron_h",
        {name: value for name, value in _NEMOTRON.items() if "expert" not in name}
        | {"layers_block_type": ["mamba", "mlp", "attention"]}
        | {"use_conv_bias": False, "use_bias": True, "mlp_bias": True},
        _OF_NEMOTRON | {"attention.head_count_kv": [0, 0, 2], "feed_forward_length": [0, 40, 0]},
        permuted=True,
    ),
    "exaone_moe": Form(
        "exaone_moe",
        "exaone-moe",
        SPARSE
        | {"head_dim": 12, "num_hidden_layers": 4, "sliding_window": 6, "num_shared_experts": 2}
        | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "routed_scaling_factor": 1.7},
        _GROUPED
        | {
            "expert_count": 6,
            "expert_group_count": 1,
            "expert_group_used_count": 1,
            "expert_shared_feed_forward_length": 24,
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": SLIDING,
            "rope.scaling.type": "none",
        },
    ),
    "ernie4_5_moe": Form(
        "ernie4_5_moe",
        "ernie4_5-moe",
        {"moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 12, "num_hidden_layers": 4, "intermediate_size": 48}
        | {"moe_layer_start_index": 1, "moe_layer_interval": 1, "tie_word_embeddings": False},
        _WIDE
        | {
            "expert_count": 6,
            "expert_used_count": 3,
            "expert_shared_count": 2,
            "expert_shared_feed_forward_length": 24,
            "leading_dense_block_count": 1,
            "interleave_moe_layer_step": 1,
        },
    ),
    "cohere2_moe": Form(
        "cohere2_moe",
        "cohere2moe",
        COHERE2
        | {"num_shared_experts": 2, "expert_selection_fn": "sigmoid", "norm_topk_prob": False, "rms_norm_eps": 0.05},
        _OF_COHERE2 | {"expert_shared_count": 2, "expert_shared_feed_forward_length": 24},
        named_as="glm4moe",
    ),
    # Norms that subtract the mean, weights that sum to 1, and two dense layers of full attention, with positions.
    "cohere2_moe-routed": Form(
        "cohere2_moe",
        "cohere2moe",
        COHERE2
        | {"expert_selection_fn": "sigmoid", "layer_norm_eps": 0.05, "tie_word_embeddings": False}
        | {"mlp_layer_types": ["dense", "dense", *["sparse"] * 3]}
        | {"layer_types": ["full_attention", "full_attention", "sliding_attention"] + ["full_attention"] * 2},
        _OF_COHERE2
        | {"expert_weights_norm": True, "attention.layer_norm_epsilon": 0.05, "leading_dense_block_count": 2}
        | {"attention.sliding_window_pattern": [False, False, True, False, False]},
        named_as="glm4moe",
    ),
    "cohere2_moe-softmax": Form(
        "cohere2_moe",
        "cohere2moe",
        COHERE2 | {"num_shared_experts": 1},
        _OF_COHERE2
        | {"expert_gating_func": 3, "expert_weights_norm": True}
        | {"expert_shared_count": 1, "expert_shared_feed_forward_length": 12},
        named_as="glm4moe",
    ),
    "hunyuan_v1_moe": Form(
        "hunyuan_v1_moe",
        "hunyuan-moe",
        HUNYUAN,
        {
            "expert_count": 6,
            "expert_used_count": 3,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 20,
            "expert_shared_feed_forward_length": 20,
            "rope.freq_base": 100.0 * 50.0**1.2,
            "rope.scaling.type": "none",
        },
    ),
    # Chunks, growth of queries and layers without positions are those that llama.cpp implies, as the class does.
    "llama4": Form(
        "llama4_text",
        "llama4",
        _LLAMA4 | COUNTS | {"interleave_moe_layer_step": 2, "rope_parameters": NO_TRANSITION},
        _OF_LLAMA4 | _MOE | {"interleave_moe_layer_step": 2},
    ),
    # As many experts as in models without norms of queries and keys.
    "llama4-many": Form(
        "llama4_text",
        "llama4",
        _LLAMA4 | {"num_local_experts": 128, "num_experts_per_tok": 1, "use_qk_norm": False},
        _OF_LLAMA4 | {"expert_count": 128, "expert_used_count": 1, "interleave_moe_layer_step": 1},
    ),
    "lfm2": Form("lfm2", "lfm2", _LFM2 | {"tie_word_embeddings": False, "block_auto_adjust_ff_dim": False}, _OF_LFM2),
    "lfm2_moe": Form(
        "lfm2_moe",
        "lfm2moe",
        _LFM2 | EXPERTS | {"num_dense_layers": 2},
        _OF_LFM2 | _MOE | _WIDE | {"leading_dense_block_count": 2, "expert_gating_func": 2},
    ),
    "qwen3_5": Form("qwen3_5_text", "qwen35", _DELTA, _OF_DELTA | _QWEN, offset=1.0),
    "qwen3_5_moe": Form(
        "qwen3_5_moe_text",
        "qwen35moe",
        _DELTA | EXPERTS | {"shared_expert_intermediate_size": 20},
        _OF_DELTA | _QWEN | _MOE | _WIDE | _SHARED,
        offset=1.0,
    ),
    "qwen3_next": Form(
        "qwen3_next",
        "qwen3next",
        _DELTA | EXPERTS | {"shared_expert_intermediate_size": 20, "norm_topk_prob": True},
        _OF_DELTA | _MOE | _WIDE | _SHARED,
        offset=1.0,
    ),
    "granite-dense": Form("granitemoehybrid", "granitehybrid", _GRANITE, _OF_GRANITE, permuted=True),
    "granite-experts": Form(
        "granitemoehybrid",
        "granitehybrid",
        _GRANITE | COUNTS,
        _OF_GRANITE | _MOE,
        permuted=True,
    ),
    "gemma4": Form("gemma4_text", "gemma4", _GEMMA4, _OF_GEMMA4, rotated=5),
    "gemma4-experts": Form(
        "gemma4_text",
        "gemma4",
        _GEMMA4
        | {
            "attention_k_eq_v": True,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 12,
        },
        {key: value for key, value in _OF_GEMMA4.items() if key != "feed_forward_length"}
        | {
            "attention.shared_kv_layers": 0,
            "attention.head_count_kv": [4, 4, 2, 4, 4, 2],
            "embedding_length_per_layer_input": 0,
        }
        | _MOE
        | _WIDE,
        rotated=5,
    ),
}
# Path in a layer -> name in files, where the gguf package does not know it or the converter splits a tensor.
_PATHS = {
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "feed_forward.expert_bias": "exp_probs_b.bias",
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "mamba.dt_bias": "ssm_dt.bias",
    "mamba.A_log": "ssm_a",
    "mamba.D": "ssm_d",
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.experts.down_proj": "ffn_down_exps.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
}
# Architectures whose experts the converter writes as the class has them.
_AS_THEY_ARE = ("gemma4", "mistral4", "nemotron_h_moe")


def _tiled(array: np.ndarray, config, size: int, axis: int = 0) -> np.ndarray:
    """Put the first heads of values of all groups in front, then the second, ..."""
    groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
    parts = np.split(array, heads, axis=axis)
    return np.concatenate(
        [parts[group * (heads // groups) + i] for i in range(heads // groups) for group in range(groups)], axis
    )


def _delta(path: str, array: np.ndarray, config) -> dict[str, np.ndarray]:
    """Change a tensor of the gated delta rule."""
    name, size = path.removeprefix("linear_attn."), config.linear_value_head_dim
    groups, keys = config.linear_num_key_heads, config.linear_key_head_dim
    if name == "in_proj_qkvz.weight":
        share = config.linear_num_value_heads // groups * size
        ends = np.cumsum([keys, keys, share])
        split = [np.split(one, ends) for one in np.split(array, groups)]
        queries, first, values, gates = (np.concatenate(parts) for parts in zip(*split, strict=True))
        return {"attn_qkv.weight": np.concatenate([queries, first, values]), "attn_gate.weight": gates}
    if name == "A_log":
        array = -np.exp(array)
    if name == "conv1d.weight":
        array = array[:, 0]
    if config.model_type != "qwen3_next":
        first = 2 * groups * keys
        if name in ("in_proj_qkv.weight", "conv1d.weight"):
            array = np.concatenate([array[:first], _tiled(array[first:], config, size)])
        elif name in ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
            array = _tiled(array, config, size)
        elif name == "out_proj.weight":
            array = _tiled(array, config, size, axis=1)
    return {path: array}


def _mamba(path: str, array: np.ndarray, config) -> dict[str, np.ndarray]:
    """Change a tensor of Mamba 2; others of layers of Nemotron-H have other names."""
    match path.removeprefix("mamba.").removeprefix("mixer."):
        case "A_log":
            array = -np.exp(array)[:, None]
        case "D":
            array = array[:, None]
        case "conv1d.weight":
            array = array[:, 0]
        case "norm.weight":
            array = array.reshape(config.mamba_n_groups if path.startswith("mamba.") else config.n_groups, -1)
    return {path: array}


def _experts(path: str, array: np.ndarray, config) -> dict[str, np.ndarray]:
    """Split gate and up of experts, which take turns in gpt-oss; its matrices and those of Llama 4 are transposed."""
    own, kind = config.model_type == "gpt_oss", "bias" if path.endswith("bias") else "weight"
    turned = own or config.model_type == "llama4_text"
    array = array.swapaxes(1, 2) if turned and kind == "weight" else array
    if "down_proj" in path:
        return {f"ffn_down_exps.{kind}": array}
    gate, up = (array[:, ::2], array[:, 1::2]) if own else np.split(array, 2, axis=1)
    return {f"ffn_gate_exps.{kind}": gate, f"ffn_up_exps.{kind}": up}


def _changed(path: str, array: np.ndarray, model, form: Form) -> dict[str, np.ndarray]:
    """Return the tensors that a tensor of a layer becomes, by name in files, or else by path."""
    config, module = model.config, path.rpartition(".")[0].rpartition(".")[2]
    counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if path.startswith("linear_attn."):
        return _delta(path, array, config)
    if path.startswith("mamba."):
        return _mamba(path, array, config)
    if ".experts." in path and form.arch not in _AS_THEY_ARE:
        return _experts(path, array, config)
    if path == "shared_mlp.input_linear.weight":
        ending = "_shexp" if config.num_local_experts else ""
        return {
            f"ffn_{part}{ending}.weight": half for part, half in zip(("gate", "up"), np.split(array, 2), strict=True)
        }
    if path == "shared_mlp.output_linear.weight":
        return {"ffn_down_shexp.weight" if config.num_local_experts else "ffn_down.weight": array}
    if path == "conv.conv.weight":
        return {path: array[:, 0]}
    if path == "self_attn.kv_b_proj.weight":
        heads = array.reshape(config.num_attention_heads, -1, array.shape[1])
        keys, values = np.split(heads, [config.qk_nope_head_dim], axis=1)
        return {"attn_k_b.weight": keys.swapaxes(1, 2), "attn_v_b.weight": values}
    if form.permuted and module in counts:
        return {path: permute(array, getattr(config, counts[module]))}
    return _mamba(path, array, config) if path.startswith("mixer.") else {path: array}


def stored_tensors(model, form: Form) -> dict:
    """Name and change the tensors as llama.cpp's converter does."""
    names = gguf.get_tensor_name_map(NAMES[form.named_as or form.arch], model.config.num_hidden_layers)
    stored = {}
    prefix = "backbone." if form.family == "nemotron_h" else "model."
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        size = model.config.head_dim
        waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
        long = waves > rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        assert rope["low_freq_factor"] == rope["high_freq_factor"]
        stored["rope_freqs.weight"] = np.where(long, rope["factor"], 1.0).astype(np.float32), None
    if form.rotated is not None:
        pairs = form.metadata["rope.dimension_count"] // 2
        stored["rope_freqs.weight"] = np.where(np.arange(pairs) < form.rotated, 1, 1e30).astype(np.float32), None
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if ".act_fn." in name or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        if form.offset and name.endswith("norm.weight") and ".linear_attn." not in name:
            array = array + np.float32(form.offset)
        if not name.startswith("model.layers."):
            full = name.replace("model.", prefix)
            stored[names.get_name(full, try_suffixes=(".weight", ".bias"))] = array, None
            continue
        _, _, layer, path = name.split(".", 3)
        for own, part in _changed(path, array, model, form).items():
            known = own == path and path not in _PATHS
            full = names.get_name(f"{prefix}layers.{layer}.{own}", try_suffixes=(".weight", ".bias")) if known else None
            stored[full or f"blk.{layer}.{_PATHS.get(own, own)}"] = part, None
    return stored


def metadata_of(model, form: Form) -> dict:
    # As a dict, because attributes that differ between layers are refused.
    config, state = SimpleNamespace(**model.config.to_dict()), model.state_dict()
    rms = form.arch.startswith("lfm2")
    norm, eps = next(
        (("layer_norm_rms_epsilon" if key.startswith("rms") or rms else "layer_norm_epsilon"), getattr(config, key))
        for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
        if getattr(config, key, None) is not None
    )
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": 10_000.0}  # the converter writes none for these
    values = {
        "block_count": model.config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        f"attention.{norm}": eps,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    if getattr(config, "head_dim", None):
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    for name in ACTIVATION if form.family == "apertus" else ():
        numbers = (state[f"model.layers.{layer}.mlp.act_fn.{name}"] for layer in range(config.num_hidden_layers))
        values[f"xielu.{name}"] = [number.item() for number in numbers]
    return values | form.metadata


def write_form(path, form: Form, tokens=None):
    """Write a random model of a form; return it and the path."""
    model = random_model(form.family, form.settings)
    return model, write_gguf(path, form.arch, metadata_of(model, form), stored_tensors(model, form), tokens)
