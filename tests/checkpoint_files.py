"""Checkpoints written byte by byte without torch: a small Llama as safetensors and GGUF, and raw containers."""

import json
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]], padding: int = 0) -> Path:
    """Write tensors, name -> (dtype name, array); `padding` spaces in the header break the alignment of the data."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Make random tensors for `CONFIG`."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (10, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (16, 16),
                "self_attn.k_proj": (8, 16),
                "self_attn.v_proj": (8, 16),
                "self_attn.o_proj": (16, 16),
                "mlp.gate_proj": (24, 16),
                "mlp.up_proj": (24, 16),
                "mlp.down_proj": (16, 24),
                "input_layernorm": (16,),
                "post_attention_layernorm": (16,),
            }.items()
        }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_config(folder: Path, **changes) -> Path:
    """Change `CONFIG`; a value of ... removes the key."""
    values = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_llama(folder: Path, tensors: dict[str, np.ndarray] | None = None, **changes) -> Path:
    """Write a small Llama in one file."""
    write_config(folder, **changes)
    tensors = llama_tensors() if tensors is None else tensors
    write_safetensors(folder / "model.safetensors", {name: ("F32", array) for name, array in tensors.items()})
    return folder


def write_sharded_llama(folder: Path, **changes) -> Path:
    """Write it in two shards with an index."""
    write_config(folder, **changes)
    tensors = llama_tensors()
    weight_map = {name: f"model-0000{1 + ('layers.1.' in name)}-of-00002.safetensors" for name in tensors}
    for shard in set(weight_map.values()):
        held = {name: ("F32", tensors[name]) for name in tensors if weight_map[name] == shard}
        write_safetensors(folder / shard, held)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
