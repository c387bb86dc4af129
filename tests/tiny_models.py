"""Tiny random Hugging Face models of each supported family, the oracles of tests (torch, transformers)."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# model_type -> settings beyond COMMON. head_dim * heads differs from the width if the family allows it.
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16},
    "phi3": {"tie_word_embeddings": False},
}


def tiny_model(family: str, seed: int = 0, **overrides):
    """Make a random causal language model of `family`, float32, in eval mode, with random norms and biases."""
    config = transformers.AutoConfig.for_model(family, **(COMMON | FAMILIES[family] | overrides))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0, 0.2 if parameter.ndim > 1 else 0.1)
    return model.eval()


def save_tiny(family: str, folder: Path, seed: int = 0, dtype=None, **overrides) -> Path:
    """Write a tiny model of `family` to `folder` as safetensors with its config; return the folder."""
    model = tiny_model(family, seed, **overrides)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder)
    return Path(folder)
