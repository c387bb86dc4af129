"""A base's own further-trained version: a LoRA of it merged into its weights and written as a folder that opens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers.processors import TemplateProcessing

from jcrosslora.adapter import Adapter, LoRAFactors
from jcrosslora.checkpoint import BaseModel
from jcrosslora.checkpoint.layout import expected_shapes
from jcrosslora.errors import AdapterError
from jcrosslora.files import atomic_folder
from jcrosslora.tokens import Tokenizer, load_tokenizer

# How the weights were packed: what is written is not.
_PACKED = ("quantization_config", "compression_config")


def write_merged(base: BaseModel, adapter: Adapter, out: Path) -> Path:
    """Write a base with an adapter merged into its weights, whole or not at all.

    In float32: updates are smaller than what bfloat16 leaves of a weight. All weights are in memory at once.

    Args:
        base: read from any format.
        adapter: of this base.
        out: the folder to make: config.json, model.safetensors, tokenizer.json.

    Raises:
        AdapterError: the adapter does not fit the base.
        CheckpointError: the base or its tokenizer cannot be read.
        OutputError: the folder cannot be written.
    """
    tokenizer = load_tokenizer(base)
    tensors = merged_tensors(base, adapter)
    with atomic_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(config_of(base, tokenizer), indent=2), encoding="utf-8")
        _save_tokenizer(tokenizer, folder / "tokenizer.json")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return out


def merged_tensors(base: BaseModel, adapter: Adapter) -> dict[str, np.ndarray]:
    """Every tensor of the (text) model in float32, updates added; parts of fused matrices in their rows.

    Raises:
        AdapterError: a module that the base does not have, or factors of another shape.
    """
    names = expected_shapes(base.family, base.dims, base.config)
    tensors = {name: np.array(base.tensor(name), np.float32, order="C") for name in names}
    for name, factors in adapter.modules.items():
        module = base.modules.get(name)
        if module is None or factors.shape != module.shape:
            msg = f"{adapter.info.name}: its update of {name} {list(factors.shape)} does not fit {base.ref}"
            raise AdapterError(msg)
        rows = slice(None) if module.rows is None else slice(*module.rows)
        tensors[module.tensor][rows] += _update(factors)
    return tensors


def config_of(base: BaseModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """The configuration to write: what is not stated is left out, and every token that ends a text is named."""
    kept = {key: value for key, value in base.config.items() if value is not None and key not in _PACKED}
    return {**kept, "eos_token_id": list(tokenizer.stops), "dtype": "float32"}


def _update(factors: LoRAFactors) -> np.ndarray:
    """float32 (O, I)."""
    return np.float32(factors.scale) * (np.asarray(factors.b, np.float32) @ np.asarray(factors.a, np.float32))


def _save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json; a post-processor says which token goes in front of every text."""
    backend = tokenizer.backend
    if tokenizer.bos is not None:
        token = backend.id_to_token(tokenizer.bos)
        backend.post_processor = TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", "$B"], special_tokens=[(token, tokenizer.bos)]
        )
    backend.save(str(path))
