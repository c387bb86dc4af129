"""Weights of bitsandbytes, in 4 and in 8 bits.

bitsandbytes in 4 bits (nf4, fp4): indices into a table of 16 values, times the absolute maximum of a block.

Blocks run over the flattened matrix; a byte holds two indices, the first in its high half. With double quantisation the
maxima are themselves indices into a table of 256 values, times one maximum for each block of blocks, plus an offset.
Source: `QuantState` of https://github.com/bitsandbytes-foundation/bitsandbytes.

bitsandbytes in 8 bits (LLM.int8): each row times its absolute maximum over 127.

Source: `int8_vectorwise_dequant` of https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from jcrosslora.checkpoint.quantised.format import FLOATS, Format, Packed, Parts, Settings

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
    shape, block = _sizes(parts, state)
    count = shape[0] * shape[1]
    data = _bytes(parts)
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


def _sizes(parts: Parts, state: dict[str, Any]) -> tuple[tuple[int, int], int]:
    """Return (O, I) and the size of a block."""
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2:
        parts.refuse(f"its quant state has shape {str(shape)[:40]}, wanted two sizes")
    return (_size(parts, shape[0]), _size(parts, shape[1])), _size(parts, state.get("blocksize"))


def _size(parts: Parts, value: Any) -> int:
    if type(value) is not int or not 0 < value < _SIZE_LIMIT:
        parts.refuse(f"its quant state has {str(value)[:40]!r} where a size was wanted")
    return value


def _bytes(parts: Parts) -> np.ndarray:
    """Return the packed indices (bytes,); sharded training stores the same bytes with a float dtype."""
    return parts.array(".weight", ("U8", *FLOATS)).reshape(-1).view(np.uint8)


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
        parts.refuse(f"its quant state has nested_offset {str(offset)[:40]!r}, wanted a number")
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
