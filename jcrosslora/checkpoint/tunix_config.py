"""Translate the ModelConfig of a class of tunix into a Hugging Face configuration.

What the class fixes (Gemma's epsilon, bases of positions, the layers with windows) is written out. That of Llama does
not tell how positions are scaled, so it cannot be translated.

Source: tunix 0.1.7, the model files.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jcrosslora.architectures.config import FULL, SLIDING
from jcrosslora.errors import CheckpointError

_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "embed_dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
}
_GEMMA = {"rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh"}
_PERIOD = 6  # the last layer of each period of Gemma 3 has full attention


def is_tunix_config(config: Any) -> bool:
    """Whether an object is the ModelConfig of a class of tunix."""
    return type(config).__module__.startswith("tunix.models.")


def translate(config: Any, where: str) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        CheckpointError: of a class that does not tell everything, or that is not known.
    """
    name = type(config).__module__.split(".")[2]
    if name not in _CLASSES or getattr(config, "num_experts", None) is not None:
        why = "does not state how positions are scaled" if name == "llama3" else "is not one that can be translated"
        msg = f"{where}: the ModelConfig of tunix's {name} {why}: give config=, the content of the model's config.json"
        raise CheckpointError(msg)
    return {key: getattr(config, stated) for key, stated in _SIZES.items()} | _CLASSES[name](config)


def _qwen(config: Any, family: str) -> dict[str, Any]:
    return {
        "model_type": family,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.use_tied_embedding,
    }


def _gemma(config: Any) -> dict[str, Any]:
    stated = {"vocab_size": config.num_embed, "rope_theta": 10_000.0, **_GEMMA}
    if not config.use_post_attn_norm:
        return stated | {"model_type": "gemma"}
    return stated | {
        "model_type": "gemma2",
        "query_pre_attn_scalar": config.head_dim,
        "final_logit_softcapping": config.final_logit_softcap,
        "attn_logit_softcapping": config.attn_logits_soft_cap,
        "sliding_window": config.sliding_window_size,
        "layer_types": [SLIDING if kind.name == "LOCAL_SLIDING" else FULL for kind in config.attention_types],
    }


def _gemma3(config: Any) -> dict[str, Any]:
    by_width = config.query_pre_attn_norm.name == "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS"
    full, local = (
        {"rope_type": "linear", "factor": float(factor), "rope_theta": float(theta)}
        for factor, theta in (
            (config.global_scale_factor, config.global_base_frequency),
            (config.local_scale_factor, config.local_base_frequency),
        )
    )
    return {
        "model_type": "gemma3_text",
        "vocab_size": config.num_embed,
        "query_pre_attn_scalar": config.embed_dim // config.num_heads if by_width else config.head_dim,
        "sliding_window": config.sliding_window_size,
        "layer_types": [FULL if (n + 1) % _PERIOD == 0 else SLIDING for n in range(config.num_layers)],
        "rope_parameters": {FULL: full, SLIDING: local},
        **_GEMMA,
    }


_CLASSES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "qwen2": lambda config: _qwen(config, "qwen2"),
    "qwen3": lambda config: _qwen(config, "qwen3"),
    "gemma": _gemma,
    "gemma3": _gemma3,
}
