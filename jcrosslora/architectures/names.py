"""Names that all families share: groups of roles, tensors outside the layers, and configuration keys."""

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
# "qg_proj" holds the rows of queries and of their gates in turn, head by head.
GATED_ATTENTION = ("qg_proj", *ATTENTION[1:])
MLP = ("gate_proj", "up_proj", "down_proj")
UNGATED_MLP = ("up_proj", "down_proj")
DENSE_ROLES = (*ATTENTION, *MLP)
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
CONVOLUTION = ("conv_in_proj", "conv_out_proj")
MAMBA = ("mamba_in_proj", "mamba_out_proj")
SHARED = ("shared_gate_proj", "shared_up_proj", "shared_down_proj")  # experts that all tokens go through
# From the stream to a small latent that experts read, and back from what they return.
EXPERT_LATENT = ("expert_in_proj", "expert_out_proj")

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
# Of the inputs that each layer has beside the stream: an embedding of (V, layers * features), a projection of the
# stream before the first layer, and the norm of its output.
LAYER_EMBEDDING = "model.embed_tokens_per_layer.weight"
LAYER_INPUT_PROJECTION = "model.per_layer_model_projection.weight"
LAYER_INPUT_NORM = "model.per_layer_projection_norm.weight"


def words(text: str) -> frozenset[str]:
    """Split a list of keys at its spaces."""
    return frozenset(text.split())


# Sizes, positions and activations, understood in every family.
COMMON_KEYS = words(
    "model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim vocab_size tie_word_embeddings hidden_act rms_norm_eps "
    "max_position_embeddings rope_theta rope_scaling rope_parameters quantization_config compression_config"
)

# Settings of loading, training and generation, which do not change what the weights mean.
HARMLESS_KEYS = words(
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
