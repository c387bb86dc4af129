"""Test which settings the decoder reads from a configuration, and which it refuses by name."""

from pathlib import Path

import pytest

from jcrosslora.architectures.architecture import Architecture
from jcrosslora.architectures.settings import read_settings
from jcrosslora.checkpoint import check_config, read_dims
from jcrosslora.decoder import DecoderSettings
from jcrosslora.errors import CheckpointError

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
FULL, SLIDING = "full_attention", "sliding_attention"
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def settings(family: str, **config) -> DecoderSettings:
    """Return the settings of a base that consists of a configuration alone."""
    checked = check_config({**SIZES, "model_type": family, **config}, Path("here"))
    dims = read_dims(checked, Path("here"))
    return read_settings(Architecture(checked.family, checked.values, dims), "here")


def test_settings_are_hashable_and_comparable():
    one, same = settings("gemma3_text"), settings("gemma3_text")
    assert one == same
    assert hash(one) == hash(same)
    assert one != settings("gemma3_text", sliding_window=8)


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", {}, {"rope_parameters": {"rope_theta": 1e4}}),
        (
            "llama",
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        ),
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                "rope_parameters": {
                    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        ("gemma3_text", {"sliding_window_pattern": 3}, {"layer_types": [SLIDING, SLIDING, FULL] * 2}),
        ("gemma2", {}, {"layer_types": [SLIDING, FULL] * 3}),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL] * 4 + [SLIDING] * 2},
        ),
        ("qwen2", {"sliding_window": 8}, {}),
        (
            "phi3",
            {"rope_scaling": {"type": "su", **LONG}, "original_max_position_embeddings": 64},
            {
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG},
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_spellings_of_transformers_4_and_5_are_equivalent(family, old, new):
    assert settings(family, **old) == settings(family, **new)


def test_gemma3_uses_the_local_rope_base_in_sliding_layers():
    found = settings("gemma3_text", rope_theta=1e6, rope_local_base_freq=100.0, sliding_window=8)
    slow, fast = found.ropes[found.layer_ropes[5]], found.ropes[found.layer_ropes[0]]
    assert found.windows == (8,) * 5 + (None,)
    assert slow.frequencies[1] == pytest.approx(1e6 ** (-1 / 8))
    assert fast.frequencies[1] == pytest.approx(100.0 ** (-1 / 8))


def test_layers_without_positions_turn_by_no_angle():
    """Those of full attention in Cohere 2; in EXAONE 4 only beside windows; by the list in SmolLM3."""

    def still(family: str, **config) -> list[int]:
        found = settings(family, **config)
        return [layer for layer, place in enumerate(found.layer_ropes) if not any(found.ropes[place].frequencies)]

    assert still("cohere2") == still("exaone4") == still("smollm3") == [3]
    assert still("exaone4", sliding_window=None, layer_types=[FULL] * 6) == []
    assert still("smollm3", no_rope_layers=[0, 1, 1, 1, 1, 0, 0]) == [0, 5]
    assert still("llama4_text") == still("llama4_text", no_rope_layers=[]) == [3]
    # Of full attention with experts, and with a dense MLP unless these layers have no period of their own.
    assert still("cohere2_moe", first_k_dense_replace=2) == [5]
    assert still("cohere2_moe", first_k_dense_replace=2, prefix_dense_sliding_window_pattern=2) == [1, 5]
    assert settings("cohere2_moe", first_k_dense_replace=1).windows == (None, 4096, 4096, 4096, None, 4096)
    assert still("olmo_hybrid") == still("olmo_hybrid", rope_parameters={"rope_theta": 500.0}, rope_theta=None) == []
    assert still("olmo_hybrid", rope_theta=None) == [*range(6)]
    nothing = {"rope_theta": None, "rope_type": "yarn", "factor": 4.0}
    assert still("olmo_hybrid", rope_parameters=nothing, rope_theta=500.0) == [*range(6)]
    assert settings("smollm3", sliding_window=8, use_sliding_window=True).windows == (None,) * 3 + (8,) + (None,) * 2
    assert settings("llama4_text").windows == (8192,) * 3 + (None,) + (8192,) * 2


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ("gemma2", {"hidden_activation": "tanh"}, "hidden_activation 'tanh'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": ["x"]}}, "rope type"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.0}}, "finite"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope type 'linear'"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "'rope_scaling.factor' is inf"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1e39}}, "amplitude"),
        ("falcon_h1", {"ssm_multipliers": [1.0, float("nan")]}, "'ssm_multipliers' is nan"),
        ("llama", {"rope_scaling": "linear"}, "rope settings 'linear'"),
        ("llama", {"rope_theta": "1e4"}, "rope type 'default'"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": 0.07}, "partial_rotary_factor"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
            "1 factors, expected 8",
        ),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 7, "long_factor": [2.0] * 8}}, "7 factors"),
        ("llama", {"rope_parameters": {FULL: {"rope_theta": 1e4}, "rope_theta": 1e4}}, "mixes"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 6}, "chunked_attention"),
        ("gemma2", {"layer_types": [FULL]}, "layer_types"),
        ("gemma2", {"layer_types": FULL}, "layer_types"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma2", {"sliding_window": -4}, "sliding_window"),
        ("gemma3_text", {"sliding_window_pattern": "LLG"}, "sliding_window_pattern"),
        ("mistral", {"sliding_window": 8, "layer_types": [FULL, SLIDING] * 3}, "layer_types"),
        ("qwen2", {"layer_types": [SLIDING] * 6}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "4"}, "max_window_layers"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 2, 1, 1, 1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": -1}, "no_rope_layer_interval"),
        ("ministral3", {"rope_parameters": {"rope_theta": 1e4}}, "llama_4_scaling_beta"),
        ("llama4_text", {"attention_chunk_size": 0}, "attention_chunk_size"),
        ("llama4_text", {"attention_chunk_size": None, "layer_types": ["chunked_attention"] * 6}, "chunk_size is set"),
        ("llama4_text", {"layer_types": [SLIDING] * 6}, "'sliding_attention' is not supported"),
        ("llama4_text", {"floor_scale": 0}, "floor_scale 0"),
        ("llama4_text", {"attn_scale": None}, "attn_scale None"),
        ("llama4_text", {"intermediate_size_mlp": -1}, "intermediate_size_mlp"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}}, "llama_4"),
        ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "alpha"),
        ("cohere2", {"sliding_window": None}, "sliding_window"),
        ("exaone4", {"sliding_window": None}, "sliding_window"),
        ("cohere2_moe", {"sliding_window": None}, "sliding_window"),
        ("cohere2_moe", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling' is {'type': 'linear'"),
        ("cohere2_moe", {"expert_selection_fn": "topk"}, "'expert_selection_fn' is 'topk', expected 'softmax' or"),
        ("cohere2_moe", {"shared_expert_combination_strategy": "max"}, "expected 'average' or 'sum'"),
        ("cohere2_moe", {"first_k_dense_replace": 7}, "'first_k_dense_replace' is 7, expected at most the 6 layers"),
        ("cohere2_moe", {"first_k_dense_replace": -1}, "'first_k_dense_replace' is -1"),
        ("cohere2_moe", {"sliding_window_pattern": 0}, "'sliding_window_pattern' is 0"),
        ("cohere2_moe", {"layer_types": [SLIDING]}, "layer_types"),
        ("cohere2_moe", {"use_qk_norm": True}, "'use_qk_norm'=True is not supported for cohere2_moe"),
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2] * 5 + [1]}, "'moe_topk' is [2, 2, 2, 2, 2, 1], expected"),
        ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": [2] * 5}, "the same number for each of 6 layers"),
        ("hunyuan_v1_moe", {"moe_topk": 2, "num_experts_per_tok": 3}, "'num_experts_per_tok' are 2 and 3"),
        ("hunyuan_v1_moe", {"moe_intermediate_size": [48] * 6}, "'moe_intermediate_size' is 48, expected 96"),
        ("hunyuan_v1_moe", {"num_shared_expert": 2}, "'num_shared_expert' is 2, expected 1"),
        ("hunyuan_v1_moe", {"norm_topk_prob": False}, "'norm_topk_prob'=False is not supported for hunyuan_v1_moe"),
        ("hunyuan_v1_moe", {"moe_layer_num_skipped": 1}, "'moe_layer_num_skipped'=1 is not supported"),
        ("apertus", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("granite", {"attention_multiplier": 0}, "attention_multiplier"),
        ("nemotron", {"norm_eps": None}, "norm_eps"),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
        ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping"),
    ],
)
def test_unsupported_setting_is_refused_by_name(family, config, named):
    with pytest.raises(CheckpointError) as caught:
        settings(family, **config)
    assert named in str(caught.value)
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)
