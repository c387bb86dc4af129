"""Tiny random multimodal models of transformers, whose text models are the oracles of tests."""

from pathlib import Path

import pytest
from tiny_models import COMMON

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = COMMON | {"num_hidden_layers": 2, "head_dim": 16}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = _SMALL | {"image_size": 28, "patch_size": 14}
_CLIP = _VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model"}
_INTERN = _VISION | {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]}
_QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 14}
_QWEN_OUT = _QWEN | {"out_hidden_size": 48}

# model_type, with a word of ours behind "-" for another text model -> settings of the text model, of the vision tower,
# and of the whole.
CLASSES = {
    "gemma3": (
        {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 24},
        _SIGLIP,
        {"mm_tokens_per_image": 4},
    ),
    "gemma4": (
        {
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "sliding_window": 8,
            "global_head_dim": 24,
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": COMMON["vocab_size"],
        },
        _SMALL | {"model_type": "gemma4_vision", "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 4},
        {},
    ),
    "gemma4_unified": (
        {"model_type": "gemma4_unified_text", "sliding_window": 8, "global_head_dim": 24, "attention_k_eq_v": True},
        {"model_type": "gemma4_unified_vision", "patch_size": 4, "mm_embed_dim": 16, "mm_posemb_size": 4},
        {},
    ),
    "idefics3": ({"model_type": "llama"}, _VISION | {"model_type": "idefics3_vision"}, {}),
    "internvl": ({"model_type": "qwen2"}, _INTERN, {}),
    "llama4": (
        {
            "model_type": "llama4_text",
            "intermediate_size_mlp": 56,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_chunk_size": 8,
            "floor_scale": 4,
            "no_rope_layer_interval": 2,
        },
        _SMALL
        | {"image_size": 28, "patch_size": 14, "vision_output_dim": 16}
        | {"projector_input_dim": 16, "projector_output_dim": 16},
        {},
    ),
    "llava": ({"model_type": "llama"}, _CLIP, {}),
    "llava_next": ({"model_type": "mistral"}, _CLIP, {}),
    "llava_onevision": ({"model_type": "qwen3", "tie_word_embeddings": True}, _SIGLIP, {}),
    "mistral3": ({"model_type": "mistral"}, _VISION | {"model_type": "pixtral"}, {}),
    "mistral3-latent": (
        {
            "model_type": "mistral4",
            "num_key_value_heads": 4,
            "head_dim": 14,
            "kv_lora_rank": 10,
            "q_lora_rank": 12,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 6,
            "v_head_dim": 7,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
        },
        _VISION | {"model_type": "pixtral"},
        {},
    ),
    "qwen2_vl": (
        {"model_type": "qwen2_vl_text", "head_dim": 12, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}},
        {"depth": 1, "hidden_size": 48, "embed_dim": 16, "num_heads": 2, "patch_size": 14},
        {"tie_word_embeddings": True},
    ),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", "head_dim": 12, "rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}},
        _QWEN_OUT | {"fullatt_block_indexes": [0]},
        {},
    ),
    "qwen3_5": (
        {
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "rope_parameters": MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
        },
        _QWEN_OUT,
        {},
    ),
    "qwen3_5_moe": (
        {
            "model_type": "qwen3_5_moe_text",
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 10,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "rope_parameters": MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
        },
        _QWEN_OUT,
        {},
    ),
    "qwen3_vl": (
        {"model_type": "qwen3_vl_text", "rope_parameters": MROPE | {"mrope_interleaved": True}},
        _QWEN_OUT | {"deepstack_visual_indexes": [0]},
        {},
    ),
    "smolvlm": ({"model_type": "llama"}, _VISION | {"model_type": "smolvlm_vision"}, {}),
}


def class_of(kind: str) -> str:
    """Return the model_type of an entry of `CLASSES`."""
    return kind.partition("-")[0]


def tiny_wrapped(kind: str, seed: int = 0):
    """Make a random model of a multimodal class, float32, in eval mode."""
    text, vision, whole = CLASSES[kind]
    config = transformers.AutoConfig.for_model(class_of(kind), text_config=TEXT | text, vision_config=vision, **whole)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 0.2 if parameter.ndim > 1 else 0.1)
    return model.eval()


def save_wrapped(kind: str, folder: Path, seed: int = 0) -> Path:
    """Write such a model as transformers does; return the folder."""
    tiny_wrapped(kind, seed).save_pretrained(folder)
    return Path(folder)
