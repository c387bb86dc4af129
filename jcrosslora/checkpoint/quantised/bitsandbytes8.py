"""bitsandbytes in 8 bits (LLM.int8): each row times its absolute maximum over 127.

Source: `int8_vectorwise_dequant` of https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.format import Format, Packed, Settings, claims_method, no_obstacle
from jcrosslora.checkpoint.quantised.parts import FLOATS, Parts

_ROW_MAJOR = 0  # the only weight_format still in use


def _open(parts: Parts, _: Settings) -> Packed | None:
    if ".SCB" not in parts:
        return None
    weight, maxima = parts.matrix(".weight", "I8"), parts.array(".SCB", FLOATS)
    if maxima.size != weight.shape[0]:
        parts.refuse(f"{weight.shape[0]} rows have {maxima.size} scales (SCB)")
    if ".weight_format" in parts and (parts.array(".weight_format", ("U8",)) != _ROW_MAJOR).any():
        parts.refuse("its weight_format is not row-major")
    scales = maxima.reshape(-1, 1).astype(np.float32) / np.float32(127)
    return Packed((weight.shape[0], weight.shape[1]), "INT8", lambda ids: weight[ids].astype(np.float32) * scales[ids])


BITSANDBYTES8 = Format(
    name="bitsandbytes in 8 bits",
    claims=claims_method("bitsandbytes"),
    obstacle=no_obstacle,
    holder=".weight",
    parts=(".SCB", ".weight_format"),
    marks=(".SCB",),
    open=_open,
)
