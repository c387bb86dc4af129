"""The supported families as data: tensor names, fused matrices, norms, biases and configuration keys.

Sources: the modelling code of transformers 5 and the `config.json` files of published models. A key that is in no table
is refused (see `config.py`), because it may change what the weights mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Logical name of each role in a layer, the same in every family.
ROLE_PATHS: Mapping[str, str] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: the `model_type` of its configuration.
        architectures: accepted values in `architectures`.
        norm_in: role -> norm between the residual stream and the module's input.
        norms: norms of a layer with one weight per hidden feature.
        norm_out: role -> norm between the module's output and the residual stream.
        head_norms: norms of a layer with one weight per feature of a head.
        gain_offset: the gain of a norm is this plus its weight (1 for Gemma).
        fused: module that holds several roles as row slices -> those roles in row order.
        biases: roles that always have a bias.
        bias_keys: configuration key -> roles that have a bias if it is true.
        tied: whether the head is the embedding if the configuration does not say.
        keys: configuration keys that are understood beside `COMMON_KEYS` and `HARMLESS_KEYS`.
        fixed: configuration key -> values that do not change the meaning of the weights; others are refused.
        defaults: values of keys that a configuration may omit.
    """

    name: str
    architectures: tuple[str, ...]
    norm_in: Mapping[str, str]
    norms: tuple[str, ...]
    norm_out: Mapping[str, str] = field(default_factory=dict)
    head_norms: tuple[str, ...] = ()
    gain_offset: float = 0.0
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tied: bool = False
    keys: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def biased_roles(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the roles that have a bias in a model of this configuration."""
        return (*self.biases, *(role for key, roles in self.bias_keys.items() if config.get(key) for role in roles))

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether the output head is the embedding in a model of this configuration."""
        return bool(config.get("tie_word_embeddings", self.tied))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Sizes, positions and activations, understood in every family.
COMMON_KEYS = _words(
    "model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim vocab_size tie_word_embeddings hidden_act rms_norm_eps "
    "max_position_embeddings rope_theta rope_scaling rope_parameters quantization_config compression_config"
)

# Settings of loading, training and generation, which do not change what the weights mean.
HARMLESS_KEYS = _words(
    "_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled "
    "attn_implementation attention_dropout auto_map bos_token_id cache_implementation chunk_size_feed_forward "
    "decoder_start_token_id diversity_penalty dtype embd_pdrop encoder_no_repeat_ngram_size eos_token_id "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id hidden_dropout id2label "
    "initializer_range is_llama_config keys_to_ignore_at_inference label2id length_penalty max_length "
    "max_sequence_length max_window_layers min_length model_max_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences pad_token_id prefix problem_type repetition_penalty resid_pdrop return_dict "
    "sep_token_id suppress_tokens task_specific_params temperature tokenizer_class top_k top_p torch_dtype "
    "transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version "
    "unsloth_version_fixed use_cache use_flash_attn"
)

_PRE_NORMS = {
    **dict.fromkeys(QKV, "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention_layernorm"),
}
_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_SANDWICH_IN = {
    **dict.fromkeys(QKV, "input_layernorm"),
    **dict.fromkeys(("gate_proj", "up_proj"), "pre_feedforward_layernorm"),
}
_SANDWICH_OUT = {"o_proj": "post_attention_layernorm", "down_proj": "post_feedforward_layernorm"}
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_WINDOW = frozenset({"sliding_window", "layer_types"})
_GEMMA_KEYS = _WINDOW | {
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_bias",
    "sliding_window_pattern",
    "_sliding_window_pattern",
}
# Defaults of Gemma3TextConfig: the `text_config` of a multimodal checkpoint omits these keys.
_GEMMA3_DEFAULTS = {
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
}

# Norms in front of attention and MLP.
_pre_norm = partial(Family, norm_in=_PRE_NORMS, norms=_TWO_NORMS)
# Norms in front of and behind attention and MLP.
_gemma = partial(
    Family,
    norm_in=_SANDWICH_IN,
    norm_out=_SANDWICH_OUT,
    norms=_FOUR_NORMS,
    gain_offset=1.0,
    bias_keys={"attention_bias": ATTENTION},
    tied=True,
    fixed={"use_bidirectional_attention": (False, None)},
)
_TABLE = (
    _pre_norm(
        name="llama",
        architectures=("LlamaForCausalLM",),
        bias_keys={"attention_bias": ATTENTION, "mlp_bias": MLP},
        keys=frozenset({"attention_bias", "mlp_bias"}),
        fixed={"pretraining_tp": (1,), "rope_interleaved": (False,)},
    ),
    _pre_norm(
        name="mistral",
        architectures=("MistralForCausalLM",),
        keys=_WINDOW,
    ),
    _pre_norm(
        name="qwen2",
        architectures=("Qwen2ForCausalLM",),
        biases=QKV,
        keys=_WINDOW | {"use_sliding_window"},
    ),
    _pre_norm(
        name="qwen3",
        architectures=("Qwen3ForCausalLM",),
        head_norms=_QK_NORMS,
        bias_keys={"attention_bias": ATTENTION},
        keys=_WINDOW | {"use_sliding_window", "attention_bias"},
        defaults={"head_dim": 128},
    ),
    _gemma(
        name="gemma2",
        architectures=("Gemma2ForCausalLM",),
        keys=_GEMMA_KEYS,
        defaults={"head_dim": 256},
    ),
    _gemma(
        name="gemma3_text",
        architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        head_norms=_QK_NORMS,
        keys=_GEMMA_KEYS | {"rope_local_base_freq"},
        defaults=_GEMMA3_DEFAULTS,
    ),
    _pre_norm(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        fused={"self_attn.qkv_proj": QKV, "mlp.gate_up_proj": ("gate_proj", "up_proj")},
        keys=frozenset({"sliding_window", "original_max_position_embeddings", "partial_rotary_factor"}),
        fixed={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "lm_head_bias": (False,),
            "full_attn_mod": (1,),
            "interpolate_factor": (1,),
        },
    ),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _TABLE}
