"""Plain LoRA of any scale and initialisation: dW = s B A on an unchanged base."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jcrosslora.adapter.config import check_lora
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind, Update, each_module
from jcrosslora.adapter.names import TensorName
from jcrosslora.adapter.patterns import matching_key, module_rank, module_scale, target_name
from jcrosslora.checkpoint.wrapped import text_module_name
from jcrosslora.errors import AdapterError


def read_factors(file: AdapterFile, module: str) -> LoRAFactors:
    """Read the stored A (K, I) and B (O, K) of a module, with the scale that the configuration gives it.

    Raises:
        AdapterError: one of them is missing or damaged, or their rank is not the configuration's.
    """
    a, b = read_pair(file, module)
    _check_rank(file, module, a, b)
    scale = module_scale(file.config, pattern_name(file.config, module), a.shape[0])
    return LoRAFactors(a=a, b=b, scale=scale)


def read_pair(file: AdapterFile, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Read lora_A and lora_B of a module as they are stored.

    Raises:
        AdapterError: one of them is missing or damaged.
    """
    parts = file.modules[module].keys() & {"A", "B"}
    if len(parts) != 2:
        have = min(parts, default="")
        missing = {"A": "lora_A without its lora_B", "B": "lora_B without its lora_A", "": "neither lora_A nor lora_B"}
        msg = f"{file.path}: module {module!r} has {missing[have]}: the file is incomplete; save or download it again"
        raise AdapterError(msg)
    return file.part(module, "A"), file.part(module, "B")


def read_embedding_factors(file: AdapterFile, tensors: Sequence[TensorName]) -> LoRAFactors:
    """Read the LoRA of an embedding as an update of its V rows: a (K, D), b (V, K).

    Args:
        file: the adapter.
        tensors: `lora_embedding_A` (K, V) and `lora_embedding_B` (D, K) of one embedding.

    Raises:
        AdapterError: one of them is damaged, or their ranks differ.
        KeyError: one of them is missing.
    """
    keys = {tensor.key[-1]: tensor.key for tensor in tensors}
    a, b = (file.read(keys[side]) for side in "AB")
    if a.shape[0] != b.shape[1]:
        msg = f"its factors have ranks {a.shape[0]} and {b.shape[1]}"
        raise AdapterError(msg)
    scale = module_scale(file.config, pattern_name(file.config, tensors[0].module), a.shape[0])
    return LoRAFactors(a=np.ascontiguousarray(b.T), b=np.ascontiguousarray(a.T), scale=scale)


def pattern_name(config: Mapping[str, Any], module: str) -> str:
    """Return the spelling of a module name that the patterns use: that of the file, else that of text models."""
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    return module if matching_key(patterns, target_name(config, module)) else text_module_name(module)


def _check_rank(file: AdapterFile, module: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape[0] != b.shape[1]:
        msg = f"{file.path}: module {module!r} has A of shape {list(a.shape)} and B of shape {list(b.shape)}"
        msg += ": A [r, in] and B [out, r] of one rank were wanted; the file is damaged"
        raise AdapterError(msg)
    wanted = module_rank(file.config, pattern_name(file.config, module))
    if a.shape[0] != wanted:
        msg = f"{file.path}: module {module!r} has rank {a.shape[0]}, adapter_config.json says {wanted}"
        msg += ": correct r or rank_pattern, or use the configuration that belongs to the file"
        raise AdapterError(msg)


PLAIN = Kind(
    name="LoRA",
    peft_type="LORA",
    formula="s B A",
    read=each_module(lambda file, module: Update(read_factors(file, module))),
    check=check_lora,
)
