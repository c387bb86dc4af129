"""FP8 weights with scales.

Layouts on the hub: one scale per tensor, per output row, per block of rows and columns (DeepSeek and Qwen FP8, blocks
of 128 x 128), or per group of columns. In all of them the weight is the stored value times the scale; the name
`weight_scale_inv` refers to the scale at quantisation.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.format import Format, Packed, Settings, claims_method, no_obstacle
from jcrosslora.checkpoint.quantised.parts import FLOATS, Parts, scale_rows

DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = (".weight_scale_inv", ".weight_scale")


def block_size(settings: Settings) -> tuple[int, int] | None:
    """Return (rows, columns) of a scale block if the settings state it, else None."""
    groups = settings.get("config_groups")
    stated = [settings.get("weight_block_size")]
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        stated.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    sizes = {tuple(size) for size in stated if isinstance(size, list) and [type(n) for n in size] == [int, int]}
    size = sizes.pop() if len(sizes) == 1 else (0, 0)
    return (size[0], size[1]) if min(size) > 0 else None


def _open(parts: Parts, settings: Settings) -> Packed | None:
    if ".weight" not in parts or parts.dtype(".weight") not in DTYPES:
        return None
    ending = next((ending for ending in SCALES if ending in parts), None)
    if ending is None and not settings:
        return None
    if ending is None:
        parts.refuse(f"{parts.module + '.weight'!r} has no scale ({' or '.join(SCALES)})")
    weight, scale = parts.matrix(".weight", *DTYPES), parts.array(ending, (*FLOATS, "F8_E8M0"))
    shape = (weight.shape[0], weight.shape[1])
    scales = scale_rows(scale, shape, block_size(settings))
    if scales is None:
        parts.refuse(f"shape {list(shape)} has an FP8 scale of shape {list(scale.shape)}")
    return Packed(shape, parts.dtype(".weight"), lambda ids: weight[ids].astype(np.float32) * scales(ids))


FP8 = Format(
    name="FP8 with scales",
    claims=claims_method("fp8", "fbgemm_fp8", "compressed-tensors"),
    obstacle=no_obstacle,
    holder=".weight",
    parts=(*SCALES, ".input_scale", ".activation_scale"),
    marks=SCALES,
    open=_open,
)
