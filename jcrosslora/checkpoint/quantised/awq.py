"""AWQ in the "gemm" version of AutoAWQ: 4-bit numbers packed along the outputs in an interleaved order.

    W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]),  g = i // group size

qweight is (I, O / 8), qzeros (groups, O / 8), scales (groups, O). A word holds eight outputs; output c = 0 to 7 is in
nibble 0, 4, 1, 5, 2, 6, 3, 7. Source: https://github.com/casper-hansen/AutoAWQ.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.format import Format, Packed, Settings, claims_method
from jcrosslora.checkpoint.quantised.parts import FLOATS, Parts, group_of_each

_NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
_IN_WORD = len(_NIBBLES)


def _obstacle(settings: Settings) -> str | None:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm":
        return f"its version is {version!r}, wanted gemm"
    return None if bits == 4 else f"it has {bits!r} bits, wanted 4"


def _open(parts: Parts, _: Settings) -> Packed | None:
    if ".qweight" not in parts:
        return None
    qweight, qzeros = parts.matrix(".qweight", "I32"), parts.matrix(".qzeros", "I32")
    scales = parts.matrix(".scales", *FLOATS)
    inputs, (groups, outputs) = qweight.shape[0], scales.shape
    if (qweight.shape[1] * _IN_WORD, *qzeros.shape) != (outputs, groups, qweight.shape[1]):
        shapes = [list(array.shape) for array in (qweight, qzeros, scales)]
        parts.refuse(f"qweight, qzeros and scales of shapes {shapes} do not fit together")
    group_of = group_of_each(parts, inputs, groups)

    def rows(ids: np.ndarray) -> np.ndarray:
        numbers, zeros = _columns(qweight, ids), _columns(qzeros, ids)
        values = (numbers - zeros[group_of]) * scales[:, ids].astype(np.float32)[group_of]
        return np.ascontiguousarray(values.T)

    return Packed((outputs, inputs), "AWQ 4-bit", rows)


def _columns(packed: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Unpack the numbers of these outputs, float32 (rows, n)."""
    shifts = (4 * _NIBBLES[ids % _IN_WORD]).astype(np.uint32)
    return (packed.view(np.uint32)[:, ids // _IN_WORD] >> shifts & np.uint32(15)).astype(np.float32)


AWQ = Format(
    name="AWQ (gemm)",
    claims=claims_method("awq"),
    obstacle=_obstacle,
    holder=".qweight",
    parts=(".qweight", ".qzeros", ".scales"),
    marks=(),
    open=_open,
)
