"""GGUF models in the form of llama.cpp's converter, written with the gguf package."""

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
}
GLOBAL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """Move row j of the first half of a head to 2j and row j of the second to 2j + 1 (llama.cpp's rotary layout)."""
    size = array.shape[0] // heads
    out = np.empty_like(array)
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = array[head * size + j]
            out[head * size + 2 * j + 1] = array[head * size + size // 2 + j]
    return out


def gguf_name(name: str, arch: str) -> str:
    if name in GLOBAL:
        return GLOBAL[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    table = PARTS | (SANDWICH if arch.startswith("gemma") else {})
    return f"blk.{layer}.{table[part]}.{kind}"


def converted(name: str, array: np.ndarray, arch: str, heads: tuple[int, int]) -> np.ndarray:
    """Convert a tensor as llama.cpp does."""
    if arch == "llama" and ".q_proj." in name:
        return permute(array, heads[0])
    if arch == "llama" and ".k_proj." in name:
        return permute(array, heads[1])
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return array + np.float32(1)
    return array


def write_gguf(path: Path, arch: str, metadata: dict, tensors: dict[str, tuple], tokens=None) -> Path:
    """Write metadata, key without architecture -> value, and tensors, GGUF name -> (array, type or None)."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        full = key if key.startswith(("general.", "tokenizer.", "split.", "xielu.")) else f"{arch}.{key}"
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](full, value)
    if tokens is not None:
        model, texts, types = tokens
        writer.add_tokenizer_model(model)
        writer.add_token_list(texts)
        writer.add_token_types(types)
    for name, (array, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(config, arch: str) -> dict:
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if arch != "phi3" and getattr(config, "head_dim", None):
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if getattr(config, "sliding_window", None):
        values["attention.sliding_window"] = config.sliding_window
    rope = config.rope_parameters
    values["rope.freq_base"] = rope.get("full_attention", rope)["rope_theta"]
    if arch == "llama":
        values["rope.dimension_count"] = config.head_dim
    if arch == "phi3":
        values["rope.dimension_count"] = int(
            config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"]
        )
        values["rope.scaling.original_context_length"] = config.original_max_position_embeddings
    if arch == "gemma2":
        values |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        values[f"tokenizer.ggml.{name}_token_id"] = getattr(config, f"{key}_token_id")
    return values


def small_llama(
    path: Path, metadata=None, extra=None, drop=(), arch="llama", tokens=None, kind=None, seed=0
) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a Llama of width 64; return its path and its tensors in the Hugging Face convention."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (10, 64), "model.norm.weight": (64,)}
    parts = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (96, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
        "input_layernorm": (64,),
        "post_attention_layernorm": (64,),
    }
    shapes |= {f"model.layers.{layer}.{part}.weight": shape for layer in range(2) for part, shape in parts.items()}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    stored = {}
    for name, array in tensors.items():
        kept = kind if array.ndim == 2 else None
        stored[gguf_name(name, "llama")] = (converted(name, array, "llama", (4, 2)), kept)
    stored = {name: value for name, value in stored.items() if name not in drop} | (extra or {})
    values = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | (metadata or {})
    values = {key: value for key, value in values.items() if value is not ...}
    return write_gguf(path, arch, values, stored, tokens), tensors
