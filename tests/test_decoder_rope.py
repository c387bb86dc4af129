"""Compare rotary frequencies and layer kinds with those of transformers for published configurations."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import transformers

from jcrosslora.architectures.architecture import Architecture
from jcrosslora.architectures.settings import read_settings
from jcrosslora.checkpoint import check_config, read_dims

PHI_FACTORS = {
    "short_factor": list(np.linspace(1.0, 2.0, 48)),
    "long_factor": list(np.linspace(1.0, 60.0, 48)),
}
LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# Published configurations in the spelling of transformers 4, with the sizes that matter here.
PUBLISHED = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "head_dim": 128,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA31,
        "max_position_embeddings": 131072,
    },
    "mistral-7b": {"model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4096},
    "mistral-0.3": {"model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "rope_scaling": YARN,
        "max_window_layers": 2,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "max_position_embeddings": 131072,
    },
    "qwen2-window": {
        "model_type": "qwen2",
        "max_window_layers": 2,
        "sliding_window": 512,
        "use_sliding_window": True,
    },
    "gemma2-2b": {"model_type": "gemma2", "rope_theta": 10000.0, "sliding_window": 4096, "head_dim": 256},
    "gemma3-4b": {
        "model_type": "gemma3_text",
        "head_dim": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
    "phi-3-128k": {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope", **PHI_FACTORS},
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "sliding_window": 262144,
    },
    "phi-3.5": {
        "model_type": "phi3",
        "rope_scaling": {"type": "longrope", **PHI_FACTORS},
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 1.0,
    },
}
SIZES = {
    "hidden_size": 384,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_rotary_frequencies_and_windows_match_transformers(name):
    stated = {**SIZES, **PUBLISHED[name]}
    checked = check_config(stated, Path("here"))
    found = read_settings(Architecture(checked.family, checked.values, read_dims(checked, Path("here"))), "here")
    config = transformers.AutoConfig.for_model(**{key: _copied(value) for key, value in stated.items()})
    rotary = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    kinds = getattr(config, "layer_types", None) or [None] * 7
    for layer, kind in enumerate(kinds):
        rope, prefix = found.ropes[found.layer_ropes[layer]], ""
        if checked.family.name == "gemma3_text":
            prefix = f"{kind}_"
        np.testing.assert_allclose(rope.frequencies, getattr(rotary, f"{prefix}inv_freq"), rtol=1e-6)
        assert rope.amplitude == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"))
        slides = kind == "sliding_attention" if kind else checked.family.name in ("mistral", "phi3")
        assert found.windows[layer] == (config.sliding_window if slides else None)


def _copied(value):
    # transformers modifies the dictionaries that it is given.
    return dict(value) if isinstance(value, dict) else value
