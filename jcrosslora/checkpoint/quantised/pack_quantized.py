"""Packed integers of compressed-tensors (format pack-quantized, e.g. INT4): rows of numbers of `bits` bits in words.

A number is stored plus 2^(bits - 1). An optional zero point is packed along the rows and shifted likewise, so that the
shifts cancel. Source: https://github.com/vllm-project/compressed-tensors.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.bits import WORD, unpack
from jcrosslora.checkpoint.quantised.compressed_tensors import METHOD, compressed_obstacle
from jcrosslora.checkpoint.quantised.format import Format, Packed, Settings, claims_method
from jcrosslora.checkpoint.quantised.parts import FLOATS, Parts, checked_groups, group_of_each


def _open(parts: Parts, _: Settings) -> Packed | None:
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
    open=_open,
)
