"""INT8 weights of compressed-tensors: (stored - zero point) * scale, with scales as in FP8 and optional zero points.

Source: https://github.com/vllm-project/compressed-tensors, formats int-quantized and naive-quantized.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.compressed_tensors import METHOD, compressed_obstacle
from jcrosslora.checkpoint.quantised.format import Format, Packed, Settings, claims_method
from jcrosslora.checkpoint.quantised.fp8 import block_size
from jcrosslora.checkpoint.quantised.parts import FLOATS, Parts
from jcrosslora.checkpoint.quantised.scales import scale_rows


def _open(parts: Parts, settings: Settings) -> Packed | None:
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
    open=_open,
)
