"""FP8 weights and their scales: which quantised checkpoints are read, and how they become float32.

Three layouts occur on the hub: one scale for the tensor, one per output row, one per block of rows and columns
(DeepSeek and Qwen FP8, blocks of 128 x 128). In all of them the weight is the stored value times the scale; the name
`weight_scale_inv` refers to the scale used when the file was written.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jcrosslora.errors import CheckpointError

FP8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALE_SUFFIXES = ("_scale_inv", "_scale")


def check_quantization(config: Mapping[str, Any], path: str) -> None:
    """Refuse, by name, every quantised checkpoint but FP8 weights with scales.

    Args:
        config: the model's configuration.
        path: named in the error.

    Raises:
        CheckpointError: another kind of quantisation, e.g. gptq, awq or bitsandbytes.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        return
    settings = settings if isinstance(settings, dict) else {"quant_method": settings}
    method = settings.get("quant_method")
    if method in ("fp8", "fbgemm_fp8") or (method == "compressed-tensors" and _is_plain_fp8(settings)):
        return
    kind = f"{method} ({settings.get('format')})" if method == "compressed-tensors" else method
    msg = (
        f"{path}: weights quantised with {kind!r} are not supported (FP8 with scales is): "
        "use the unquantised checkpoint"
    )
    raise CheckpointError(msg)


def _is_plain_fp8(settings: Mapping[str, Any]) -> bool:
    sparsity = settings.get("sparsity_config")
    sparse = isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense"
    return settings.get("format") == "float-quantized" and not sparse


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(rows, columns) of a scale block as the configuration states it, else None."""
    settings = config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None


def apply_scale(weight: np.ndarray, scale: np.ndarray, name: str, block: tuple[int, int] | None = None) -> np.ndarray:
    """Dequantise one FP8 matrix.

    Args:
        weight: (O, I) in an FP8 dtype.
        scale: one number, (O,), (O, 1), or (ceil(O / block rows), ceil(I / block columns)).
        name: named in the error.
        block: rows and columns of a block; without it the ratio of the shapes decides.

    Returns:
        (O, I) float32: weight times scale.

    Raises:
        CheckpointError: the scale fits none of these layouts.
    """
    values = scale.astype(np.float32)
    if values.size == 1:
        return weight.astype(np.float32) * values.reshape(())
    if weight.ndim == 2 and values.shape in ((weight.shape[0],), (weight.shape[0], 1)):
        return weight.astype(np.float32) * values.reshape(-1, 1)
    if weight.ndim == 2 and values.ndim == 2:
        size = block or _ratio(weight.shape, values.shape)
        if size is not None and _blocks(weight.shape, size) == values.shape:
            return _scale_blocks(weight, values, size)
    msg = f"tensor {name!r} of shape {list(weight.shape)} has an FP8 scale of shape {list(scale.shape)}, unsupported"
    raise CheckpointError(msg)


def _blocks(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-n // step) for n, step in zip(shape, size, strict=True))


def _ratio(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, int] | None:
    if any(count == 0 or n % count for n, count in zip(shape, blocks, strict=True)):
        return None
    return shape[0] // blocks[0], shape[1] // blocks[1]


def _scale_blocks(weight: np.ndarray, scale: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    out = weight.astype(np.float32)
    columns = np.arange(weight.shape[1]) // size[1]
    for index, row_scale in enumerate(scale):
        out[index * size[0] : (index + 1) * size[0]] *= row_scale[columns]
    return out
