"""Read and write adapters of MLX (mlx_lm): `adapters.safetensors` and MLX's version of `adapter_config.json`.

The factors are the transposes of PEFT's: y = x W' + scale (x lora_a) lora_b, with lora_a (I, K) and lora_b (K, O). All
modules have the same rank and scale. DoRA rescales the rows of W + scale (lora_a lora_b)' to the magnitudes `m` (O,),
as in PEFT.

Source: mlx_lm/tuner/utils.py, lora.py and dora.py (mlx-lm 0.32).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jcrosslora.adapter.config import is_alpha, is_rank, shown
from jcrosslora.adapter.contents import PeftView, WriteRequest, file_factors, safetensors_bytes
from jcrosslora.adapter.folder import CONFIG, MLX_WEIGHTS
from jcrosslora.adapter.names import PREFIX
from jcrosslora.architectures.blocks import EMBEDDING
from jcrosslora.checkpoint.safetensors import Entry, SafetensorsFile
from jcrosslora.checkpoint.wrapped import TEXT
from jcrosslora.errors import AdapterError, OutputError

_IN_LAYER = re.compile(r"^model\.layers\.\d+\.(.+)$")
# PEFT's names of the tensors of a linear module, and of an embedding.
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING_PARTS = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
_EMBEDDING = "." + EMBEDDING.split(".")[-2]


def write_mlx(contents: WriteRequest, folder: Path) -> None:
    """Write all modules at one rank, padded with zeros, and scale 1.

    In a layer without an update MLX adds LoRA modules whose B is zero. The multimodal classes of mlx_lm hold their text
    model as `language_model`.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.modules.items():
        a, b = file_factors(name, factors, contents.dtype, contents.rank)
        stored = name if contents.prefix == TEXT else f"language_model.{name}"
        tensors[f"{stored}.lora_a"], tensors[f"{stored}.lora_b"] = (np.ascontiguousarray(each.T) for each in (a, b))
        if contents.magnitudes is not None:  # in float32, as in PEFT's format
            tensors[f"{stored}.m"] = np.ascontiguousarray(contents.magnitudes[name])
    config = {
        "fine_tune_type": "lora" if contents.magnitudes is None else "dora",
        "model": contents.base_name,
        "num_layers": -1,  # all; a positive number would count from the last layer
        "lora_parameters": {
            "rank": contents.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({_key(name) for name in contents.modules}),
        },
    }
    (folder / MLX_WEIGHTS).write_bytes(safetensors_bytes(tensors, {**contents.metadata, "format": "mlx"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _key(module: str) -> str:
    """Return a module's name inside its layer."""
    match = _IN_LAYER.match(module)
    if match is None:
        msg = f"module {module!r} is not part of a layer (model.layers.N), which MLX requires"
        raise OutputError(msg + ": write it in another profile")
    return match[1]


def translated_mlx(config: Mapping[str, Any], file: SafetensorsFile, where: str) -> PeftView:
    """Translate an adapter to PEFT's layout by transposing its factors; `where` is its configuration's path.

    Raises AdapterError for a whole model instead of an adapter, a missing or invalid value, and an unknown tensor.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        why = "whole weights of the model instead of an update" if kind == "full" else "not known"
        msg = f"{where}: fine_tune_type {str(kind)[:60]!r} is not supported: {why}; train it as lora or dora"
        raise AdapterError(msg)
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        msg = f"{where}: lora_parameters is {shown(config, 'lora_parameters')}, expected an object with rank "
        raise AdapterError(msg + "and scale: correct the file")
    for key, valid, wanted in (("rank", is_rank, "a whole number of 1 or more"), ("scale", is_alpha, "a number")):
        if not valid(parameters.get(key)):
            msg = f"{where}: {key} of lora_parameters is {shown(parameters, key)}, expected {wanted}: correct the "
            raise AdapterError(msg + "file")
    rank = int(parameters["rank"])
    peft = {
        "peft_type": "LORA",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": parameters["scale"] * rank,
        "use_dora": kind == "dora",
    }
    stored = {_peft_name(name, file): name for name in file.entries}
    old = {name: file.entries[key] for name, key in stored.items()}
    entries = {name: Entry(entry.dtype, entry.shape[::-1], entry.start) for name, entry in old.items()}
    # mlx_lm's default settings had one until 2025; only its first releases, of early 2024, multiplied by it.
    notes = ("alpha of lora_parameters is ignored, as mlx_lm does.",) if "alpha" in parameters else ()

    def read(name: str) -> np.ndarray:
        return np.transpose(file.array(stored[name]))

    return PeftView(file.file.path, peft, entries, read, file.file.sha256, config, notes, file.metadata)


def _peft_name(name: str, file: SafetensorsFile) -> str:
    module, _, part = name.rpartition(".")
    parts = _PARTS | (_EMBEDDING_PARTS if f".{module}".endswith(_EMBEDDING) else {})
    if not module or part not in parts:
        msg = f"{file.file.path}: tensor {name!r} is not a lora_a, lora_b or m of a module, as an adapter of MLX has "
        raise AdapterError(msg + "them: use the adapter as mlx_lm saved it")
    return f"{PREFIX}{module}.{parts[part]}"
