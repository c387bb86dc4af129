"""Weights of compressed-tensors: INT8, and packed integers; its FP8 weights are read by `fp8`.

int-quantized and naive-quantized: (stored - zero point) * scale, with scales as in FP8 and optional zero points.
pack-quantized (e.g. INT4): rows of numbers of `bits` bits in words. A number is stored plus 2^(bits - 1). An optional
zero point is packed along the rows and shifted likewise, so that the shifts cancel.

Source: https://github.com/vllm-project/compressed-tensors.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.format import (
    FLOATS,
    WORD,
    Format,
    Packed,
    Parts,
    Settings,
    checked_groups,
    claims_method,
    group_of_each,
    scale_rows,
    unpack,
)
from jcrosslora.checkpoint.quantised.fp8 import block_size

METHOD = "compressed-tensors"
_READ = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_MIXED = "mixed-precision"  # each group of modules states its own


def compressed_obstacle(settings: Settings) -> str | None:
    """Return why a checkpoint cannot be read (format, sparse storage, rotations at run time), None if it can."""
    if settings.get("quant_method") != METHOD:
        return None
    whole, groups = settings.get("format"), settings.get("config_groups")
    if whole == _MIXED and isinstance(groups, dict):
        own = [group.get("format") for group in groups.values() if isinstance(group, dict)]
    else:
        own = [whole]
    if unread := [name for name in own if name not in _READ]:
        return f"its format is {unread[0]!r}, wanted one of {', '.join(_READ)}"
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return f"its weights are stored sparse ({sparsity['format']!r})"
    return "its weights are rotated (transform_config)" if settings.get("transform_config") else None


def _open_int8(parts: Parts, settings: Settings) -> Packed | None:
    if ".weight" not in parts or parts.dtype(".weight") != "I8" or ".weight_scale" not in parts:
        return None
    weight = parts.matrix(".weight", "I8")
    shape, block = (weight.shape[0], weight.shape[1]), block_size(settings)
    scale = parts.array(".weight_scale", FLOATS)
    scales = scale_rows(scale, shape, block)
    if scales is None:
        parts.refuse(f"shape {list(shape)} has a scale of shape {list(scale.shape)}")
    if ".weight_zero_point" not in parts:
        return Packed(shape, "INT8", lambda ids: weight[ids].astype(np.float32) * scales(ids))
    zeros = scale_rows(parts.array(".weight_zero_point", ("I8",)), shape, block)
    if zeros is None:
        parts.refuse("its zero point does not have the shape of a scale")
    return Packed(shape, "INT8", lambda ids: (weight[ids].astype(np.float32) - zeros(ids)) * scales(ids))


INT8 = Format(
    name="INT8 of compressed-tensors",
    claims=claims_method(METHOD),
    obstacle=compressed_obstacle,
    holder=".weight",
    parts=(".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point"),
    marks=(".weight_scale",),
    open=_open_int8,
)


def _open_pack_quantized(parts: Parts, _: Settings) -> Packed | None:
    if ".weight_packed" not in parts:
        return None
    packed = parts.matrix(".weight_packed", "I32")
    shape = _shape(parts, packed)
    bits = _bits(parts, packed.shape[1], shape[1])
    scales = _scales(parts, shape)
    zeros = _zeros(parts, scales.shape, bits)
    groups = _groups(parts, shape[1], scales.shape[1])

    def rows(ids: np.ndarray) -> np.ndarray:
        numbers = unpack(packed[ids], bits, shape[1]).astype(np.float32)
        return (numbers - zeros[ids][:, groups]) * scales[ids][:, groups].astype(np.float32)

    return Packed(shape, f"packed INT{bits}", rows)


def _shape(parts: Parts, packed: np.ndarray) -> tuple[int, int]:
    stated = parts.array(".weight_shape", ("I64", "I32"), 1)
    if stated.shape != (2,) or int(stated[0]) != packed.shape[0] or int(stated[1]) <= 0:
        parts.refuse(f"weight_shape says {stated[:4].tolist()}, the packed tensor has {packed.shape[0]} rows")
    return int(stated[0]), int(stated[1])


def _bits(parts: Parts, words: int, inputs: int) -> int:
    fitting = [bits for bits in range(1, 9) if -(-inputs * bits // WORD) == words]
    if len(fitting) != 1:
        parts.refuse(f"{words} words per row fit no single number of bits for {inputs} numbers")
    return fitting[0]


def _scales(parts: Parts, shape: tuple[int, int]) -> np.ndarray:
    """Return the scales (O, groups) in the stored dtype."""
    scale = parts.array(".weight_scale", FLOATS)
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), (shape[0], 1))
    if scale.shape == (shape[0],):
        return scale[:, None]
    if scale.ndim != 2 or scale.shape[0] != shape[0]:
        parts.refuse(f"shape {list(shape)} has a scale of shape {list(scale.shape)}")
    return scale


def _zeros(parts: Parts, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Return the zero points, uint8 (O, groups), with the same shift as the numbers."""
    rows, groups = shape
    if ".weight_zero_point" not in parts:
        return np.broadcast_to(np.uint8(2 ** (bits - 1)), shape)
    packed = parts.matrix(".weight_zero_point", "I32")
    if packed.shape != (-(-rows * bits // WORD), groups):
        parts.refuse(f"scales of shape {list(shape)} have packed zero points of shape {list(packed.shape)}")
    return unpack(packed.T, bits, rows).T


def _groups(parts: Parts, inputs: int, groups: int) -> np.ndarray:
    # All entries are -1 if the groups are in order.
    listed = parts.array(".weight_g_idx", ("I32", "I64"), 1) if ".weight_g_idx" in parts else None
    if listed is None or bool((listed == -1).all()):
        return group_of_each(parts, inputs, groups)
    return checked_groups(parts, ".weight_g_idx", inputs, groups)


PACK_QUANTIZED = Format(
    name="packed INT4 and INT8 of compressed-tensors",
    claims=claims_method(METHOD),
    obstacle=compressed_obstacle,
    holder=".weight_packed",
    parts=(".weight_packed", ".weight_shape", ".weight_scale", ".weight_zero_point", ".weight_g_idx"),
    marks=(".weight_packed",),
    open=_open_pack_quantized,
)
