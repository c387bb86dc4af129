"""Write the format of MLX (mlx_lm): `adapters.safetensors` and an `adapter_config.json` of its own.

Its factors are the transposes of PEFT's: y = x W' + scale (x lora_a) lora_b, with lora_a (I, K) and lora_b (K, O). One
rank and one scale hold for all modules. The magnitudes of a DoRA are `m` (O,), over norms of the rows as in PEFT.

Source: mlx_lm/tuner/utils.py, lora.py and dora.py (mlx-lm 0.32).
"""

import json
import re
from pathlib import Path

import numpy as np

from jcrosslora.adapter.contents import Contents
from jcrosslora.adapter.file_factors import file_factors
from jcrosslora.adapter.folder import CONFIG, MLX_WEIGHTS
from jcrosslora.adapter.safetensors_bytes import safetensors_bytes
from jcrosslora.errors import OutputError

_IN_LAYER = re.compile(r"^model\.layers\.\d+\.(.+)$")


def write_mlx(contents: Contents, folder: Path) -> None:
    """Write one rank, lower ones padded with zeros, and scale 1.

    In a layer without an update MLX adds LoRA modules of its own, whose B is zero.

    Raises:
        OutputError: a module that is not part of a layer, values that do not fit the dtype.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, factors in contents.modules.items():
        a, b = file_factors(name, factors, contents.dtype, contents.rank)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = (np.ascontiguousarray(each.T) for each in (a, b))
        if contents.magnitudes is not None:  # in float32, as in PEFT's format
            tensors[f"{name}.m"] = np.ascontiguousarray(contents.magnitudes[name])
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
    """Return the name inside its layer, by which MLX chooses modules."""
    match = _IN_LAYER.match(module)
    if match is None:
        msg = f"module {module!r} is not part of a layer (model.layers.N), which MLX requires"
        raise OutputError(msg + ": write it in another profile")
    return match[1]
