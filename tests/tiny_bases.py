"""Tiny llama bases written without torch, and adapters for them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.checkpoint import BaseModel, open_base

ROLES = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}


def shapes(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> dict[str, tuple[int, int]]:
    return {
        "q_proj": (heads * head_dim, hidden),
        "k_proj": (kv_heads * head_dim, hidden),
        "v_proj": (kv_heads * head_dim, hidden),
        "o_proj": (hidden, heads * head_dim),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }


def llama_tensors(*, hidden=48, heads=4, kv_heads=2, head_dim=12, intermediate=80, layers=3, vocab=96, seed=0):
    """Random weights of a llama model with tied embeddings."""
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": rng.normal(size=(vocab, hidden)), "model.norm.weight": np.ones(hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = rng.uniform(0.5, 1.5, hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = rng.uniform(0.5, 1.5, hidden)
        for role, shape in shapes(hidden, heads, kv_heads, head_dim, intermediate).items():
            tensors[f"{prefix}.{ROLES[role]}.{role}.weight"] = rng.normal(size=shape) / 7
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def llama_config(*, hidden=48, heads=4, kv_heads=2, head_dim=12, intermediate=80, layers=3, vocab=96):
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }


def write_llama(folder: Path, *, seed=0, tokenizer=True, first_token=0, **dims) -> Path:
    """Write a random llama base; `first_token` shifts its vocabulary against another's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(**dims)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(llama_tensors(seed=seed, **dims), folder / "model.safetensors")
    if tokenizer:
        write_tokenizer(folder, config["vocab_size"], first_token)
    return folder


def open_pair(folder: Path, **dims) -> tuple[BaseModel, BaseModel]:
    """A source base, and a target of other weights and dimensions."""
    return open_base(write_llama(folder / "source", seed=0)), open_base(write_llama(folder / "target", seed=1, **dims))


def write_tokenizer(folder: Path, vocab: int, first_token: int = 0) -> None:
    """A byte-level BPE vocabulary of the words w0, w1, ... with ids counted from `first_token`'s word."""
    words = {f"w{first_token + i}": i for i in range(vocab)}
    (Path(folder) / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                "decoder": {"type": "ByteLevel"},
                "model": {"type": "BPE", "vocab": words, "merges": []},
            }
        )
    )


def random_adapter(base: BaseModel, *, rank=4, seed=0, roles=None, scale=1.0) -> Adapter:
    """Random factors for all modules of a base, or for those of some roles."""
    rng = np.random.default_rng(seed)
    modules = {
        name: LoRAFactors(
            a=rng.normal(size=(rank, module.shape[1])).astype(np.float32),
            b=rng.normal(size=(module.shape[0], rank)).astype(np.float32),
            scale=scale,
        )
        for name, module in base.modules.items()
        if roles is None or module.role in roles
    }
    return Adapter(modules=modules)


def mixed_ranks(base: BaseModel) -> Adapter:
    """Rank 2 in layer 0 and 3 elsewhere, with a scale of their own, and modules without an update."""
    two, three = (random_adapter(base, rank=rank, seed=rank, scale=0.02 * rank) for rank in (2, 3))
    both = {name: (two if ".0." in name else three).modules[name] for name in base.modules}
    return Adapter({name: factors for name, factors in both.items() if not name.endswith("1.mlp.up_proj")})


def delta(factors: LoRAFactors) -> np.ndarray:
    """dW in float64."""
    return factors.scale * np.asarray(factors.b, np.float64) @ np.asarray(factors.a, np.float64)
