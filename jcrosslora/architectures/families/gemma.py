"""Gemma 1 to 3 (text): gains of 1 + weight, a scaled embedding, and from Gemma 2 on norms behind attention and MLP."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jcrosslora.architectures.family import QK_NORMS, Family, Gguf, Positions, Windows
from jcrosslora.architectures.names import ATTENTION
from jcrosslora.architectures.sizes import Number

_NORMS = {
    "attn": "input_layernorm",
    "attn_post": "post_attention_layernorm",
    "mlp": "pre_feedforward_layernorm",
    "mlp_post": "post_feedforward_layernorm",
}
_KEYS = frozenset(
    {
        "sliding_window",
        "layer_types",
        "hidden_activation",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "attention_bias",
        "sliding_window_pattern",
        "_sliding_window_pattern",
    }
)
_PERIOD_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")

_gemma = partial(
    Family,
    gain_offset=1.0,
    bias_keys={"attention_bias": ATTENTION},
    tied=True,
    activation="gelu_pytorch_tanh",
    embedding_scale=Number("hidden_size", power=0.5),
    fixed={"use_bidirectional_attention": (False, None)},
)
_scaled = partial(
    _gemma,
    norms=_NORMS,
    activation_key="hidden_activation",
    attn_scale=Number("query_pre_attn_scalar", 256, power=-0.5),
)


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """State the approximation by tanh, which the first releases mean by "gelu"; a second key then names it."""
    return {**config} | ({"hidden_act": "gelu_pytorch_tanh"} if config.get("hidden_act") == "gelu" else {})


GEMMA = _gemma(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    gguf=Gguf("gemma"),
    resolve=_resolve,
    keys=frozenset({"attention_bias"}),
    fixed={
        "use_bidirectional_attention": (False, None),
        "hidden_activation": ("gelu_pytorch_tanh",),
    },
    defaults={"head_dim": 256},
)
GEMMA2 = _scaled(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    gguf=Gguf(
        "gemma2",
        numbers={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    attn_soft_cap=Number("attn_logit_softcapping", 50.0),
    final_soft_cap=Number("final_logit_softcapping", 30.0),
    windows=Windows(period=2, period_keys=_PERIOD_KEYS),
    keys=_KEYS,
    defaults={"head_dim": 256},
)
GEMMA3 = _scaled(
    name="gemma3_text",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf=Gguf("gemma3"),
    norms=_NORMS | QK_NORMS,
    # A soft cap of the attention scores, which the configuration may state, is ignored by transformers.
    final_soft_cap=Number("final_logit_softcapping"),
    windows=Windows(period=6, period_keys=_PERIOD_KEYS),
    positions=Positions(theta=1_000_000.0, local_theta=10_000.0, local_theta_key="rope_local_base_freq"),
    keys=_KEYS | {"rope_local_base_freq"},
    # Defaults of Gemma3TextConfig: the `text_config` of a multimodal checkpoint omits these keys.
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)
