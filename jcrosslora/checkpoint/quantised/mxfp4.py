"""MXFP4 experts, in which gpt-oss is published: groups of 32 numbers of 4 bits with one scale, a power of two.

Layout of a matrix of all experts (E, O, I), from `transformers/integrations/mxfp4.py`: `_blocks` (E, O, I / 32, 16) has
two numbers a byte, the first in the lower bits, and `_scales` (E, O, I / 32) the exponents plus 127. The numbers are
E2M1 of the OCP Microscaling Formats specification.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.format import Format, Packed, Settings, claims_method, no_obstacle
from jcrosslora.checkpoint.quantised.parts import Parts

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_BIAS = 127
_BLOCKS, _SCALES = "_blocks", "_scales"


def _open(parts: Parts, settings: Settings) -> Packed | None:
    del settings
    if _BLOCKS not in parts:
        return None
    blocks, scales = parts.array(_BLOCKS, ("U8",), 4), parts.array(_SCALES, ("U8",), 3)
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
    parts=(_SCALES,),
    marks=(),
    open=_open,
    ending=_BLOCKS,
)
