"""GPTQ and AWQ: small integers packed into words, with a scale and a zero point per group of inputs.

GPTQ: numbers of 2, 3, 4 or 8 bits packed along the inputs, in one word after the other.

    W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]),  g = g_idx[i], else i // group_size

qweight is (I * bits / 32, O), scales (groups, O), qzeros (groups, O * bits / 32). The first format stores zero - 1,
"gptq_v2" stores zero. Source: the layouts of AutoGPTQ and GPTQModel (https://github.com/ModelCloud/GPTQModel).

AWQ in the "gemm" version of AutoAWQ: 4-bit numbers packed along the outputs in an interleaved order.

    W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]),  g = i // group size

qweight is (I, O / 8), qzeros (groups, O / 8), scales (groups, O). A word holds eight outputs; output c = 0 to 7 is in
nibble 0, 4, 1, 5, 2, 6, 3, 7. Source: https://github.com/casper-hansen/AutoAWQ.
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
    group_of_each,
    unpack,
)

_BITS = (2, 3, 4, 8)
_LAYOUTS = ("gptq", "gptq_v2", "", None)


def _obstacle(settings: Settings) -> str | None:
    layout = _layout(settings)
    if layout not in _LAYOUTS or settings.get("is_marlin_format"):
        return f"its layout is {'marlin' if settings.get('is_marlin_format') else layout!r}, wanted gptq or gptq_v2"
    if settings.get("pack_dtype", "int32") != "int32":
        return f"its words are {settings['pack_dtype']!r}, wanted int32"
    return None


def _layout(settings: Settings) -> object:
    return settings.get("checkpoint_format") or settings.get("format")


def _open(parts: Parts, settings: Settings) -> Packed | None:
    if ".qweight" not in parts:
        return None
    qweight, qzeros = parts.matrix(".qweight", "I32"), parts.matrix(".qzeros", "I32")
    scales = parts.matrix(".scales", *FLOATS)
    inputs, bits = _inputs_and_bits(parts, settings, qweight.shape[0])
    groups, outputs = scales.shape
    if qweight.shape[1] != outputs or qzeros.shape != (groups, outputs * bits // WORD) or outputs * bits % WORD:
        shapes = [list(array.shape) for array in (qweight, qzeros, scales)]
        parts.refuse(f"qweight, qzeros and scales of shapes {shapes} do not fit together with {bits} bits")
    group_of = _groups(parts, settings, inputs, groups)
    old = _layout(settings) != "gptq_v2"

    def rows(ids: np.ndarray) -> np.ndarray:
        numbers = unpack(qweight[:, ids].T, bits, inputs).astype(np.float32)
        zeros = _zeros(qzeros, bits, outputs, old)[:, ids].T.astype(np.float32)
        return (numbers - zeros[:, group_of]) * scales[:, ids].T.astype(np.float32)[:, group_of]

    return Packed((outputs, inputs), f"GPTQ {bits}-bit", rows)


def _inputs_and_bits(parts: Parts, settings: Settings, words: int) -> tuple[int, int]:
    """Return the number of inputs and the bits, from g_idx (one entry per input) if present, else from the settings."""
    bits, inputs = settings.get("bits"), 0
    if _has_groups(parts):
        inputs = len(parts.array(".g_idx", ("I32", "I64"), 1))
        bits = words * WORD // inputs
    elif type(bits) is int and bits in _BITS:
        inputs = words * WORD // bits
    if type(bits) is not int or bits not in _BITS or words * WORD != inputs * bits:
        stated = settings.get("bits")
        parts.refuse(f"{words} words for {inputs} inputs (bits: {stated!r} stated), wanted 2, 3, 4 or 8 bits")
    return inputs, bits


def _has_groups(parts: Parts) -> bool:
    return ".g_idx" in parts and parts.array(".g_idx", ("I32", "I64"), 1).size > 0


def _groups(parts: Parts, settings: Settings, inputs: int, groups: int) -> np.ndarray:
    if _has_groups(parts):
        return checked_groups(parts, ".g_idx", inputs, groups)
    size = settings.get("group_size")
    if type(size) is not int or size <= 0:
        return group_of_each(parts, inputs, groups)
    if -(-inputs // size) != groups:
        parts.refuse(f"{inputs} inputs in groups of {size} do not have {groups} groups of scales")
    return np.arange(inputs) // size


def _zeros(qzeros: np.ndarray, bits: int, outputs: int, old: bool) -> np.ndarray:
    """Unpack the zero points, uint8 (groups, O)."""
    if old and WORD % bits == 0:
        # The writer subtracts 1 from all numbers of a word at once, so a zero point of 0 borrows from its neighbour;
        # adding to the whole word undoes that.
        ones = sum(1 << shift for shift in range(0, WORD, bits))
        return unpack(qzeros.view(np.uint32) + np.uint32(ones), bits, outputs)
    zeros = unpack(qzeros, bits, outputs)
    return (zeros + np.uint8(1)) & np.uint8(2**bits - 1) if old else zeros


GPTQ = Format(
    name="GPTQ",
    methods=("gptq",),
    obstacle=_obstacle,
    holder=".qweight",
    parts=(".qweight", ".qzeros", ".scales", ".g_idx"),
    open=_open,
)


_NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
_IN_WORD = len(_NIBBLES)


def _awq_obstacle(settings: Settings) -> str | None:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm":
        return f"its version is {version!r}, wanted gemm"
    return None if bits == 4 else f"it has {bits!r} bits, wanted 4"


def _open_awq(parts: Parts, _: Settings) -> Packed | None:
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
    methods=("awq",),
    obstacle=_awq_obstacle,
    holder=".qweight",
    parts=(".qweight", ".qzeros", ".scales"),
    open=_open_awq,
)
