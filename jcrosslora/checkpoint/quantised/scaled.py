"""Weights with scales: FP8 and MXFP4, and the INT8 and packed integers of compressed-tensors.

FP8 on the hub has one scale per tensor, per output row, per block of rows and columns (DeepSeek and Qwen FP8, blocks of
128 x 128), or per group of columns. In all of them the weight is the stored value times the scale; the name
`weight_scale_inv` refers to the scale at quantisation.

MXFP4 experts, in which gpt-oss is published: groups of 32 numbers of 4 bits with one scale, a power of two.
Layout of a matrix of all experts (E, O, I), from `transformers/integrations/mxfp4.py`: `_blocks` (E, O, I / 32, 16) has
two numbers a byte, the first in the lower bits, and `_scales` (E, O, I / 32) the exponents plus 127. The numbers are
E2M1 of the OCP Microscaling Formats specification.

int-quantized and naive-quantized: (stored - zero point) * scale, with scales as in FP8 and optional zero points.
pack-quantized (e.g. INT4): rows of numbers of `bits` bits in words. A number is stored plus 2^(bits - 1). An optional
zero point is packed along the rows and has the same offset, so that the offsets cancel.
Source: https://github.com/vllm-project/compressed-tensors.
"""

import numpy as np

from jcrosslora.checkpoint.quantised.format import FLOATS, WORD, Format, Packed, Parts, Settings, scale_rows, unpack

METHOD = "compressed-tensors"
_READ = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_MIXED = "mixed-precision"  # each group of modules states its own


def compressed_obstacle(settings: Settings) -> str | None:
    """Return why a checkpoint cannot be read (format, sparse storage, rotations at run time), None if it can."""
    if settings.get("quant_method") != METHOD:
        return None
    whole, groups = settings.get("format"), settings.get("config_groups")
    if whole == _MIXED and isinstance(groups, dict):
        own = [group.get("format") for group in groups.values() if isinstance(group, dict)]
    else:
        own = [whole]
    if unread := [name for name in own if name not in _READ]:
        return f"its format is {unread[0]!r}, expected one of {', '.join(_READ)}"
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return f"its weights are stored sparse ({sparsity['format']!r})"
    return "its weights are rotated (transform_config)" if settings.get("transform_config") else None


def _open_int8(parts: Parts, settings: Settings) -> Packed | None:
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
    methods=(METHOD,),
    obstacle=compressed_obstacle,
    holder=".weight",
    parts=(".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point"),
    marks=(".weight_scale",),
    open=_open_int8,
)


def _open_pack_quantized(parts: Parts, settings: Settings) -> Packed | None:
    if ".weight_packed" not in parts:
        return None
    packed = parts.matrix(".weight_packed", "I32")
    shape = _shape(parts, packed)
    bits = _bits(parts, packed.shape[1], shape[1])
    if (stated := _stated_bits(settings)) not in (None, bits):  # older versions left bits of a word unused
        parts.refuse(f"numbers of {bits} bits are packed, and the configuration says {stated}")
    scales = _scales(parts, shape)
    zeros = _zeros(parts, scales.shape, bits)
    groups = _groups(parts, shape[1], scales.shape[1])

    def rows(ids: np.ndarray) -> np.ndarray:
        numbers = unpack(packed[ids], bits, shape[1]).astype(np.float32)
        return (numbers - zeros[ids][:, groups]) * scales[ids][:, groups].astype(np.float32)

    return Packed(shape, f"packed INT{bits}", rows)


def _stated_bits(settings: Settings) -> int | None:
    """Return the bits of a weight that all groups of the settings state; None if they differ or state none."""
    found = {one.get("num_bits") for one in _of_weights(settings)}
    stated = found.pop() if len(found) == 1 else None
    return stated if type(stated) is int else None


def _of_weights(settings: Settings) -> list[Settings]:
    """Return what the settings of compressed-tensors say of the weights of each group of modules."""
    groups = settings.get("config_groups")
    every = groups.values() if isinstance(groups, dict) else ()
    return [weights for one in every if isinstance(one, dict) and isinstance(weights := one.get("weights"), dict)]


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
        return parts.even_groups(inputs, groups)
    return parts.listed_groups(".weight_g_idx", inputs, groups)


PACK_QUANTIZED = Format(
    name="packed INT4 and INT8 of compressed-tensors",
    methods=(METHOD,),
    obstacle=compressed_obstacle,
    holder=".weight_packed",
    parts=(".weight_packed", ".weight_shape", ".weight_scale", ".weight_zero_point", ".weight_g_idx"),
    marks=(".weight_packed",),
    open=_open_pack_quantized,
)


DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
SCALES = (".weight_scale_inv", ".weight_scale")


def block_size(settings: Settings) -> tuple[int, int] | None:
    """Return (rows, columns) of a scale block if the settings state it, else None."""
    stated = [settings.get("weight_block_size"), *(weights.get("block_structure") for weights in _of_weights(settings))]
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
    methods=("fp8", "fbgemm_fp8", "compressed-tensors"),
    holder=".weight",
    parts=(*SCALES, ".input_scale", ".activation_scale"),
    marks=SCALES,
    open=_open_fp8,
)


_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEVELS = np.array([*_HALF, *(-value for value in _HALF)], np.float32)
_BIAS = 127
_BLOCKS, _EXPONENTS = "_blocks", "_scales"


def _open_mxfp4(parts: Parts, _: Settings) -> Packed | None:
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
    methods=("mxfp4",),
    holder=_BLOCKS,
    parts=(_EXPONENTS,),
    open=_open_mxfp4,
    ending=_BLOCKS,
)
