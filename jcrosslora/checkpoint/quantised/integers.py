"""Small integers with scales, as GPTQ, AWQ and bitsandbytes store them.

GPTQ: numbers of 2, 3, 4 or 8 bits packed along the inputs, in one word after the other.

    W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]),  g = g_idx[i], else i // group_size

qweight is (I * bits / 32, O), scales (groups, O), qzeros (groups, O * bits / 32). The first format stores zero - 1,
"gptq_v2" stores zero. Source: the layouts of AutoGPTQ and GPTQModel (https://github.com/ModelCloud/GPTQModel).

AWQ in the "gemm" version of AutoAWQ: 4-bit numbers packed along the outputs in an interleaved order.

    W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]),  g = i // group size

qweight is (I, O / 8), qzeros (groups, O / 8), scales (groups, O). A word holds eight outputs; output c = 0 to 7 is in
nibble 0, 4, 1, 5, 2, 6, 3, 7. Source: https://github.com/casper-hansen/AutoAWQ.

bitsandbytes in 4 bits (nf4, fp4): indices into a table of 16 values, times the absolute maximum of a block. Blocks run
over the flattened matrix; a byte holds two indices, the first in its high half. With double quantisation the maxima are
themselves indices into a table of 256 values, times one maximum for each block of blocks, plus an offset. In 8 bits
(LLM.int8) each row is times its absolute maximum over 127. Source: `QuantState` and `int8_vectorwise_dequant` of
https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from jcrosslora.checkpoint.quantised.format import FLOATS, WORD, Format, Packed, Parts, Settings, unpack

_BITS = (2, 3, 4, 8)
_LAYOUTS = ("gptq", "gptq_v2", "", None)


def _gptq_obstacle(settings: Settings) -> str | None:
    layout = _layout(settings)
    if layout not in _LAYOUTS or settings.get("is_marlin_format"):
        return f"its layout is {'marlin' if settings.get('is_marlin_format') else layout!r}, expected gptq or gptq_v2"
    if settings.get("pack_dtype", "int32") != "int32":
        return f"its words are {settings['pack_dtype']!r}, expected int32"
    return None


def _layout(settings: Settings) -> object:
    return settings.get("checkpoint_format") or settings.get("format")


def _open_gptq(parts: Parts, settings: Settings) -> Packed | None:
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
        parts.refuse(f"{words} words for {inputs} inputs (bits: {stated!r} stated), expected 2, 3, 4 or 8 bits")
    return inputs, bits


def _has_groups(parts: Parts) -> bool:
    return ".g_idx" in parts and parts.array(".g_idx", ("I32", "I64"), 1).size > 0


def _groups(parts: Parts, settings: Settings, inputs: int, groups: int) -> np.ndarray:
    if _has_groups(parts):
        return parts.listed_groups(".g_idx", inputs, groups)
    size = settings.get("group_size")
    if type(size) is not int or size <= 0:
        return parts.even_groups(inputs, groups)
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
    obstacle=_gptq_obstacle,
    holder=".qweight",
    parts=(".qweight", ".qzeros", ".scales", ".g_idx"),
    open=_open_gptq,
)


_NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
_IN_WORD = len(_NIBBLES)


def _awq_obstacle(settings: Settings) -> str | None:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    bits = settings.get("bits", settings.get("w_bit", 4))
    if version != "gemm":
        return f"its version is {version!r}, expected gemm"
    return None if bits == 4 else f"it has {bits!r} bits, expected 4"


def _open_awq(parts: Parts, _: Settings) -> Packed | None:
    if ".qweight" not in parts:
        return None
    qweight, qzeros = parts.matrix(".qweight", "I32"), parts.matrix(".qzeros", "I32")
    scales = parts.matrix(".scales", *FLOATS)
    inputs, (groups, outputs) = qweight.shape[0], scales.shape
    if (qweight.shape[1] * _IN_WORD, *qzeros.shape) != (outputs, groups, qweight.shape[1]):
        shapes = [list(array.shape) for array in (qweight, qzeros, scales)]
        parts.refuse(f"qweight, qzeros and scales of shapes {shapes} do not fit together")
    group_of = parts.even_groups(inputs, groups)

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


_STATE = ".weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_STATE_LIMIT = 1 << 16  # bytes; a quant state has a few hundred
_SIZE_LIMIT = 1 << 31
_LARGEST = 1e38  # float32 ends at 3.4e38; the bound also excludes infinity and NaN


def _open_bitsandbytes4(parts: Parts, _: Settings) -> Packed | None:
    kind = next((kind for kind in _KINDS if _STATE + kind in parts), None)
    if kind is None:
        return None
    state = _read_state(parts, _STATE + kind)
    stated = state.get("shape")
    if not isinstance(stated, list) or len(stated) != 2:
        parts.refuse(f"its quant state has shape {str(stated)[:40]}, expected two sizes")
    shape, block = (_size(parts, stated[0]), _size(parts, stated[1])), _size(parts, state.get("blocksize"))
    count = shape[0] * shape[1]
    # Sharded training stores the same bytes with a float dtype.
    data = parts.array(".weight", ("U8", *FLOATS)).reshape(-1).view(np.uint8)
    table = parts.array(".weight.quant_map", ("F32",))
    blocks, maxima = _block_maxima(parts, state)
    if data.size != -(-count // 2) or blocks != -(-count // block) or table.size != 16:
        found = f"{data.size} bytes, {blocks} blocks of {block}, a table of {table.size}"
        parts.refuse(f"shape {list(shape)} does not fit {found}")

    def rows(ids: np.ndarray) -> np.ndarray:
        places = ids[:, None] * shape[1] + np.arange(shape[1])
        pairs = data[places >> 1]
        numbers = np.where(places & 1, pairs & 15, pairs >> 4)
        of = places // block
        first = of[:, :1]
        # The few maxima of each row are computed once, and then one is taken for each number.
        spans = first + np.arange(int((of[:, -1:] - first).max(initial=0)) + 1)
        scales = np.take_along_axis(maxima(np.minimum(spans, blocks - 1)), of - first, axis=1)
        return table.reshape(-1)[numbers] * scales

    return Packed(shape, kind.upper(), rows)


def _read_state(parts: Parts, ending: str) -> dict[str, Any]:
    raw = parts.array(ending, ("U8",), 1)
    try:
        state = json.loads(raw[:_STATE_LIMIT].tobytes().decode("utf-8"))
    except (ValueError, RecursionError):
        parts.refuse("its quant state is not JSON")
    if not isinstance(state, dict):
        parts.refuse("its quant state is not a JSON object")
    return state


def _size(parts: Parts, value: Any) -> int:
    if type(value) is not int or not 0 < value < _SIZE_LIMIT:
        parts.refuse(f"its quant state has {str(value)[:40]!r} where a size was expected")
    return value


def _block_maxima(parts: Parts, state: dict[str, Any]) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """Return the number of blocks, and a function from block numbers to their absolute maxima, float32.

    The maxima are computed on demand: kept for every weight they would take 0.4 GB for 7B parameters.
    """
    if ".weight.nested_absmax" not in parts:
        stored = parts.array(".weight.absmax", FLOATS).reshape(-1)
        return stored.size, lambda blocks: stored[blocks].astype(np.float32)
    places = parts.array(".weight.absmax", ("U8",)).reshape(-1)
    nested = parts.array(".weight.nested_absmax", ("F32",)).reshape(-1)
    table = parts.array(".weight.nested_quant_map", ("F32",)).reshape(-1)
    block, offset = _size(parts, state.get("nested_blocksize")), state.get("nested_offset")
    if not isinstance(offset, int | float) or not abs(offset) < _LARGEST:
        parts.refuse(f"its quant state has nested_offset {str(offset)[:40]!r}, expected a number")
    if table.size != 256 or nested.size != -(-places.size // block):
        parts.refuse(f"{places.size} blocks do not fit {nested.size} blocks of {block}, a table of {table.size}")
    return places.size, lambda blocks: table[places[blocks]] * nested[blocks // block] + np.float32(offset)


BITSANDBYTES4 = Format(
    name="bitsandbytes in 4 bits",
    methods=("bitsandbytes",),
    holder=".weight",
    parts=(
        *(_STATE + kind for kind in _KINDS),
        *(f".weight.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
    ),
    marks=tuple(_STATE + kind for kind in _KINDS),
    open=_open_bitsandbytes4,
)


_ROW_MAJOR = 0  # the only weight_format still in use


def _open_bitsandbytes8(parts: Parts, _: Settings) -> Packed | None:
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
    methods=("bitsandbytes",),
    holder=".weight",
    parts=(".SCB", ".weight_format"),
    marks=(".SCB",),
    open=_open_bitsandbytes8,
)
