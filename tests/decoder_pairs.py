"""Provide tiny models of every family in torch and in the decoder, from the same files."""

import jax
import numpy as np
import pytest
from tiny_models import save_tiny, torch, transformers

from jcrosslora.checkpoint import open_base
from jcrosslora.decoder import forward, load_model, logits

LENGTH = 40  # beyond the window of 16, and beyond longrope's original length of 32
SHORT = 24
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
VARIANTS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN, "hidden_act": "gelu"}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", QWEN_WINDOW),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "gemma2": ("gemma2", {"num_hidden_layers": 4, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "gemma3_text",
        # transformers ignores this soft cap.
        {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE, "attn_logit_softcapping": 0.1},
    ),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
}

# One of each family, with different kinds of layers where the family has them.
EACH_FAMILY = ("llama", "mistral", "qwen2-window", "qwen3", "gemma2", "gemma3", "phi3-longrope")


def load_pair(name, folder):
    """Return a torch model, and base, settings and parameters from the same files."""
    family, overrides = VARIANTS[name]
    save_tiny(family, folder, **overrides)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    base = open_base(folder)
    return model.eval(), base, load_model(base)


def pair_fixture(names):
    """Return a fixture over the pairs of these names."""

    @pytest.fixture(scope="module", params=names)
    def pair(request, tmp_path_factory):
        return load_pair(request.param, tmp_path_factory.mktemp(request.param))

    return pair


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, 96, (batch, length)).astype(np.int32)


def torch_logits(model, tokens, **inputs) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long(), use_cache=False, **inputs).logits.numpy()


@jax.jit
def run(ours, tokens, mask=None, adapter=None):
    return logits(ours, forward(ours.with_adapter(adapter), tokens, mask=mask).hidden)
