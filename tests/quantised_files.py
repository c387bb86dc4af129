"""Quantised checkpoints, made by the formulas of their formats bit by bit.

Each maker takes a float weight (O, I), O and I multiples of 32 and I of 64, and returns the tensors that replace it and
the matrix that they represent, in float64. The readers share none of this code.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from checkpoint_files import write_safetensors
from tiny_bases import llama_config, llama_tensors, write_tokenizer

from jcrosslora.checkpoint.quantised import FORMATS

Tensors = dict[str, tuple[str, np.ndarray]]  # ending -> (dtype, array)
DIMS = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 128, "layers": 1}
GROUP = 32

NF4 = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
FP4 = [0, 0.0052083333, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25, 0, -0.0052083333, -2 / 3, -1, -1 / 3, -0.5, -1 / 6, -0.25]


def packed_words(numbers: list[int], bits: int) -> list[int]:
    """Pack numbers, lowest bits first, into words of 32 bits."""
    stream = [number >> bit & 1 for number in numbers for bit in range(bits)]
    words = []
    for start in range(0, len(stream), 32):
        word = sum(value << place for place, value in enumerate(stream[start : start + 32]))
        words.append(word - (1 << 32) if word >> 31 else word)
    return words


def packed_columns(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Pack each column of (n, m) downwards, as int32."""
    return np.array([packed_words([int(x) for x in column], bits) for column in numbers.T], np.int32).T


def bitsandbytes4(table: list[float], name: str, double: bool) -> Callable[[np.ndarray], tuple[Tensors, np.ndarray]]:
    def make(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        blocks = weight.astype(np.float64).reshape(-1, 64)
        codes = np.array(table, np.float32).astype(np.float64)
        largest = np.abs(blocks).max(axis=1)
        state = {"quant_type": name, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        tensors: Tensors = {}
        if double:
            steps = np.linspace(-1, 1, 256).astype(np.float32)
            offset = float(np.float32(largest.mean()))
            nested = [np.abs(part).max() for part in np.split(largest - offset, range(256, largest.size, 256))]
            nested = np.array(nested, np.float32)
            places = [np.abs(steps * nested[i // 256] - (x - offset)).argmin() for i, x in enumerate(largest)]
            largest = np.array([float(steps[p]) * nested[i // 256] + offset for i, p in enumerate(places)])
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            tensors[".weight.absmax"] = ("U8", np.array(places, np.uint8))
            tensors[".weight.nested_absmax"] = ("F32", nested)
            tensors[".weight.nested_quant_map"] = ("F32", steps)
        else:
            largest = largest.astype(np.float32)
            tensors[".weight.absmax"] = ("F32", largest)
        numbers = [
            [int(np.abs(codes * m - x).argmin()) for x in block] for block, m in zip(blocks, largest, strict=True)
        ]
        flat = [number for block in numbers for number in block]
        pairs = [first << 4 | second for first, second in zip(flat[::2], flat[1::2], strict=True)]
        tensors[".weight"] = ("U8", np.array(pairs, np.uint8)[:, None])
        tensors[".weight.quant_map"] = ("F32", np.array(table, np.float32))
        raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
        tensors[f".weight.quant_state.bitsandbytes__{name}"] = ("U8", raw)
        values = [[codes[n] * m for n in block] for block, m in zip(numbers, largest, strict=True)]
        return tensors, np.array(values).reshape(weight.shape)

    return make


def bitsandbytes8(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
    largest = np.abs(weight).max(axis=1)
    numbers = np.round(weight / largest[:, None] * 127).astype(np.int8)
    tensors: Tensors = {
        ".weight": ("I8", numbers),
        ".SCB": ("F32", largest.astype(np.float32)),
        ".weight_format": ("U8", np.array(0, np.uint8)),
    }
    return tensors, numbers.astype(np.float64) * largest[:, None].astype(np.float64) / 127


def affine(weight: np.ndarray, group_of: np.ndarray, bits: int, symmetric: bool = False):
    """Quantise by groups of inputs: integers (O, I), scales float16 (O, G) and zero points (O, G)."""
    groups = int(group_of.max()) + 1
    top = 2**bits - 1
    scales = np.zeros((len(weight), groups), np.float16)
    zeros = np.zeros((len(weight), groups), int)
    numbers = np.zeros(weight.shape, int)
    for o, row in enumerate(weight.astype(np.float64)):
        for g in range(groups):
            part = row[group_of == g]
            low, high = min(part.min(), 0), max(part.max(), 0)
            if symmetric:
                low, high = -np.abs(part).max(), np.abs(part).max()
            scales[o, g] = (high - low) / top
            zeros[o, g] = 2 ** (bits - 1) if symmetric else round(-low / float(scales[o, g]))
            scaled = np.round(part / float(scales[o, g])) + zeros[o, g]
            numbers[o, group_of == g] = np.clip(scaled, 0, top).astype(int)
    values = np.zeros(weight.shape)
    for o, i in np.ndindex(*weight.shape):
        values[o, i] = (numbers[o, i] - zeros[o, group_of[i]]) * float(scales[o, group_of[i]])
    return numbers, scales, zeros, values


def gptq(bits: int, *, old: bool = True, act_order: bool = False, listed: bool = True, positive: bool = False):
    """Make GPTQ tensors; `positive` weights have a zero point of 0, from which the old layout borrows in its word."""

    def make(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        weight = np.abs(weight) if positive else weight
        group_of = np.arange(weight.shape[1]) // GROUP
        if act_order:
            group_of = np.random.default_rng(4).permutation(group_of)
        numbers, scales, zeros, values = affine(weight, group_of, bits)
        if old and positive:
            ones = sum(1 << place for place in range(0, 32, bits))
            qzeros = (packed_columns(zeros, bits).view(np.uint32) - np.uint32(ones)).view(np.int32)
        else:
            qzeros = packed_columns(zeros - old, bits)
        tensors: Tensors = {
            ".qweight": ("I32", packed_columns(numbers.T, bits)),
            ".qzeros": ("I32", qzeros.T),
            ".scales": ("F16", scales.T),
        }
        if listed:
            tensors[".g_idx"] = ("I32", group_of.astype(np.int32))
        return tensors, values

    return make


def awq(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
    numbers, scales, zeros, values = affine(weight, np.arange(weight.shape[1]) // GROUP, 4)

    def interleaved(rows: np.ndarray) -> np.ndarray:
        # From the lowest nibble on, a word holds the outputs 0, 2, 4, 6, 1, 3, 5, 7.
        order = [start + place for start in range(0, rows.shape[1], 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)]
        return packed_columns(rows[:, order].T, 4).T

    tensors: Tensors = {
        ".qweight": ("I32", interleaved(numbers.T)),
        ".qzeros": ("I32", interleaved(zeros.T)),
        ".scales": ("F16", scales.T),
    }
    return tensors, values


def pack_quantized(bits: int, *, symmetric: bool, act_order: bool = False):
    def make(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        group_of = np.arange(weight.shape[1]) // GROUP
        if act_order:
            group_of = np.random.default_rng(5).permutation(group_of)
        numbers, scales, zeros, values = affine(weight, group_of, bits, symmetric)
        tensors: Tensors = {
            ".weight_packed": ("I32", packed_columns(numbers.T, bits).T),
            ".weight_scale": ("F16", scales),
            ".weight_shape": ("I64", np.array(weight.shape)),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = ("I32", packed_columns(zeros, bits))
        if act_order:
            tensors[".weight_g_idx"] = ("I32", group_of.astype(np.int32))
        return tensors, values

    return make


def int8(symmetric: bool):
    def make(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        numbers, scales, zeros, values = affine(weight, np.zeros(weight.shape[1], int), 8, symmetric)
        tensors: Tensors = {
            ".weight": ("I8", (numbers - 128).astype(np.int8)),
            ".weight_scale": ("F16", scales),
        }
        if not symmetric:
            tensors[".weight_zero_point"] = ("I8", (zeros - 128).astype(np.int8))
        return tensors, values

    return make


def fp8(block: tuple[int, int], ending: str):
    def make(weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
        rows, columns = (min(n, step) for n, step in zip(weight.shape, block, strict=True))
        scale = np.zeros((-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), np.float32)
        for i, j in np.ndindex(*scale.shape):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[i, j] = np.abs(part).max() / 448  # the largest number of E4M3
        each = np.array([[scale[i // rows, j // columns] for j in range(weight.shape[1])] for i in range(len(weight))])
        stored = (weight / each).astype(ml_dtypes.float8_e4m3fn)
        return {".weight": ("F8_E4M3", stored), ending: ("F32", scale)}, stored.astype(np.float64) * each

    return make


@dataclass(frozen=True)
class Case:
    """One format: its settings in config.json, its maker, the dtype of its modules, its error."""

    settings: dict | None
    make: Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
    dtype: str
    error: float  # relative error against the original weight; a misread format is near 1 or above


def compressed(form: str, **weights) -> dict:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CASES = {
    "nf4": Case(BNB4, bitsandbytes4(NF4, "nf4", False), "NF4", 0.12),
    "nf4, double": Case(BNB4, bitsandbytes4(NF4, "nf4", True), "NF4", 0.13),
    "fp4": Case(BNB4, bitsandbytes4(FP4, "fp4", False), "FP4", 0.16),
    "nf4 without settings": Case(None, bitsandbytes4(NF4, "nf4", True), "NF4", 0.13),
    "int8 rows": Case({"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes8, "INT8", 0.02),
    "int8 rows without settings": Case(None, bitsandbytes8, "INT8", 0.02),
    **{
        f"gptq {bits} bits": Case({"quant_method": "gptq", "bits": bits}, gptq(bits), f"GPTQ {bits}-bit", error)
        for bits, error in ((2, 0.7), (3, 0.3), (4, 0.15), (8, 0.02))
    },
    "gptq, act order": Case({"quant_method": "gptq", "bits": 4}, gptq(4, act_order=True), "GPTQ 4-bit", 0.15),
    "gptq, no list": Case(
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq(4, listed=False), "GPTQ 4-bit", 0.15
    ),
    "gptq, version 2": Case(
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, old=False), "GPTQ 4-bit", 0.15
    ),
    "gptq, zero points of 0": Case(
        {"quant_method": "gptq", "bits": 4, "sym": False}, gptq(4, positive=True), "GPTQ 4-bit", 2
    ),
    "awq": Case({"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, awq, "AWQ 4-bit", 0.15),
    "packed int4": Case(
        compressed("pack-quantized", num_bits=4), pack_quantized(4, symmetric=True), "packed INT4", 0.15
    ),
    "packed int4, zero points": Case(
        compressed("pack-quantized", num_bits=4), pack_quantized(4, symmetric=False), "packed INT4", 0.15
    ),
    "packed int8, act order": Case(
        compressed("pack-quantized", num_bits=8), pack_quantized(8, symmetric=True, act_order=True), "packed INT8", 0.02
    ),
    "int8": Case(compressed("int-quantized", num_bits=8), int8(True), "INT8", 0.02),
    "int8, zero points": Case(compressed("int-quantized", num_bits=8), int8(False), "INT8", 0.02),
    "fp8 channels": Case(
        compressed("float-quantized", num_bits=8), fp8((1, 1 << 30), ".weight_scale"), "F8_E4M3", 0.05
    ),
    "fp8 blocks": Case(
        {"quant_method": "fp8", "weight_block_size": [48, 48]}, fp8((48, 48), ".weight_scale_inv"), "F8_E4M3", 0.05
    ),
}


def format_of(name: str) -> tuple[str, ...]:
    """Return what tells the format of a case from others: its dtype, and which formats claim its settings."""
    settings = CASES[name].settings or {}
    return CASES[name].dtype, *(form.ending + str(place) for place, form in enumerate(FORMATS) if form.claims(settings))


def write_quantised(folder: Path, case: Case, seed: int = 0, **dims) -> dict[str, np.ndarray]:
    """Write a tiny Llama with quantised linear weights; return the tensors that it represents, in float64."""
    folder.mkdir(parents=True, exist_ok=True)
    dims = DIMS | dims
    stored: Tensors = {}
    meant = {}
    for name, tensor in llama_tensors(seed=seed, **dims).items():
        if name.endswith("_proj.weight"):
            parts, meant[name] = case.make(tensor)
            stored |= {name.removesuffix(".weight") + ending: part for ending, part in parts.items()}
        else:
            stored[name], meant[name] = ("F32", tensor), tensor.astype(np.float64)
    write_safetensors(folder / "model.safetensors", stored)
    config = llama_config(**dims)
    if case.settings is not None:
        config["quantization_config"] = case.settings
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, config["vocab_size"])
    return meant
