"""Small floating point numbers with scales: FP8 and MXFP4.

FP8 on the hub has one scale per tensor, per output row, per block of rows and columns (DeepSeek and Qwen FP8, blocks of
128 x 128), or per group of columns. In all of them the weight is the stored value times the scale; the name
`weight_scale_inv` refers to the scale at quantisation.

MXFP4 experts, in which gpt-oss is published: groups of 32 numbers of 4 bits with one scale, a power of two.

Layout of a matrix of all experts (E, O, I), from `transformers/integrations/mxfp4.py`: `_blocks` (E, O, I / 32, 16) has
two numbers a byte, the first in the lower bits, and `_scales` (E, O, I / 32) the exponents plus 127. The numbers are
E2M1 of the OCP Microscaling Formats specification.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.format import (
    FLOATS,
    Format,
    Packed,
    Parts,
    Settings,
    claims_method,
    no_obstacle,
    scale_rows,
)

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


def _open_fp8(parts: Parts, settings: Settings) -> Packed | None:
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
    open=_open_fp8,
)


_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_BIAS = 127
_BLOCKS, _EXPONENTS = "_blocks", "_scales"


def _open_mxfp4(parts: Parts, settings: Settings) -> Packed | None:
    del settings
    if _BLOCKS not in parts:
        return None
    blocks, scales = parts.array(_BLOCKS, ("U8",), 4), parts.array(_EXPONENTS, ("U8",), 3)
    if blocks.shape != (*scales.shape, 16):
        parts.refuse(f"blocks of shape {list(blocks.shape)} have scales of shape {list(scales.shape)}")
    blocks, exponents = blocks.reshape(-1, *blocks.shape[2:]), scales.reshape(-1, scales.shape[2])

    def rows(ids: np.ndarray) -> np.ndarray:
        packed = blocks[ids]
        numbers = _LEVELS[np.stack([packed & 0x0F, packed >> 4], axis=-1)]
        scaled = np.ldexp(numbers, exponents[ids].astype(np.int32)[..., None, None] - _BIAS)
        return scaled.reshape(len(ids), -1)

    return Packed((*scales.shape[:2], 32 * scales.shape[2]), "MXFP4", rows)


MXFP4 = Format(
    name="MXFP4",
    claims=claims_method("mxfp4"),
    obstacle=no_obstacle,
    holder=_BLOCKS,
    parts=(_EXPONENTS,),
    marks=(),
    open=_open_mxfp4,
    ending=_BLOCKS,
)
