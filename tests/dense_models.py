"""Tiny random models of the dense families beyond those of `tiny_models`, with settings that are awkward for each."""

from expert_models import EXPERT_VARIANTS, LLAMA3
from tiny_models import torch, transformers

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Kinds of layers change inside these four.
FOUR = {"num_hidden_layers": 4, "sliding_window": 6}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
MINISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
KINDS = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# Name -> (model_type, settings beyond COMMON). The size of a head is not hidden_size / heads where a class allows it.
VARIANTS = {
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3-window": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0], "tie_word_embeddings": False},
    ),
    "ministral3": ("ministral3", {"head_dim": 12, "sliding_window": 6, "rope_parameters": MINISTRAL}),
    "olmo2": ("olmo2", {"rope_parameters": LLAMA3, "attention_bias": True}),
    "olmo3": ("olmo3", FOUR | {"rope_parameters": KINDS}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.3,
            "logits_scaling": 5.0,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "glm": ("glm", {"head_dim": 12}),
    "glm4": ("glm4", {"head_dim": 12, "partial_rotary_factor": 0.7, "attention_bias": False}),
    "cohere": ("cohere", {"logit_scale": 0.3}),
    "cohere2": ("cohere2", FOUR | {"attention_bias": True, "logit_scale": 0.3}),
    "exaone4": ("exaone4", FOUR | {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "seed_oss": ("seed_oss", {"head_dim": 12, "attention_out_bias": True, "mlp_bias": True, "rope_parameters": YARN}),
    "hunyuan": (
        "hunyuan_v1_dense",
        {
            "head_dim": 12,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "gemma": ("gemma", {"head_dim": 12}),
    "starcoder2": ("starcoder2", {"sliding_window": 6}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi-norms": ("phi", {"partial_rotary_factor": 0.25, "qk_layernorm": True, "tie_word_embeddings": True}),
    "nemotron": ("nemotron", {"head_dim": 12, "attention_bias": True}),
    "arcee": ("arcee", {"head_dim": 12, "mlp_bias": True, "attention_bias": True}),
    "ernie4_5": ("ernie4_5", {"head_dim": 12, "use_bias": True, "tie_word_embeddings": False}),
    "apertus": ("apertus", {"rope_parameters": LLAMA3}),
}


def dense_model(name: str, seed: int = 0):
    """Make a random model of a variant, see `random_model`."""
    return random_model(*(VARIANTS | EXPERT_VARIANTS)[name], seed=seed)


def random_model(family: str, settings: dict, *, seed: int = 0):
    """Make a random model, float32, in eval mode, with random norms, biases and parameters of the activation."""
    # transformers changes the dictionaries that it is given.
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    config = transformers.AutoConfig.for_model(family, **(COMMON | settings))
    torch.manual_seed(seed)
    # Mistral 4 of text alone is listed among the classes of images and text.
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "alpha" in name or name.endswith("_scale") or name.endswith("router.scale"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):
                buffer.normal_(0.0, 0.3)
            elif name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()
