"""PEFT adapter folders written by hand, without peft: the inputs of the reading tests."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors.numpy

from jcrosslora.adapter import Adapter, AdapterInfo, LoRAFactors
from jcrosslora.checkpoint import BaseInfo

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def matrix(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tensors(names=(Q, V), rank=2, width=6, rows=5, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    result = {}
    for place, name in enumerate(names, seed):
        result[f"base_model.model.{name}.lora_A.weight"] = matrix(rank, width, seed=place, dtype=dtype)
        result[f"base_model.model.{name}.lora_B.weight"] = matrix(rows, rank, seed=100 + place, dtype=dtype)
    return result


def write_folder(folder: Path, config=None, weights=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config))
    safetensors.numpy.save_file(tensors() if weights is None else weights, folder / "adapter_model.safetensors")
    return folder


def base_of(modules: Iterable[str], *, fused=None, revision=None, digest="") -> BaseInfo:
    """A base of which only the names of its modules matter."""
    return BaseInfo("base", "base", revision, digest, "llama", dict.fromkeys(modules, (1, 1)), fused or {})


def delta(factors: LoRAFactors) -> np.ndarray:
    return factors.scale * np.asarray(factors.b).astype(np.float64) @ np.asarray(factors.a).astype(np.float64)


def adapter_of(ranks: dict[str, int], scale: float = 1.5, width: int = 6, rows: int = 5, seed: int = 0) -> Adapter:
    modules = {
        name: LoRAFactors(
            a=matrix(rank, width, seed=seed + place), b=matrix(rows, rank, seed=seed + 50 + place), scale=scale
        )
        for place, (name, rank) in enumerate(ranks.items())
    }
    return Adapter(modules=modules, info=AdapterInfo(name="made", base_name="owner/base"))
