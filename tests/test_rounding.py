"""Test the intervals that stored weights may have been rounded from."""

import ml_dtypes
import numpy as np
import pytest
from quantised_files import FP4, NF4

from jcrosslora.relation import infer_rounding

WEIGHT = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)


def fp8(kind, top):
    scale = np.abs(WEIGHT).max(axis=1, keepdims=True) / top
    return (WEIGHT / scale).astype(kind).astype(np.float32) * scale


def microscaled(block, scale):
    """Round blocks to e2m1 with one scale each, the largest number over 6."""
    parts = WEIGHT.reshape(len(WEIGHT), -1, block)
    scales = scale(np.abs(parts).max(axis=-1, keepdims=True) / 6)
    levels = np.clip(parts / scales, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (levels * scales).reshape(WEIGHT.shape)


def bitsandbytes(levels):
    table, parts = np.array(levels), WEIGHT.reshape(-1, 64)
    largest = np.abs(parts).max(axis=1, keepdims=True)
    nearest = np.abs(parts[..., None] / largest[..., None] - table).argmin(axis=-1)
    return (table[nearest] * largest).astype(np.float32).reshape(WEIGHT.shape)


STORED = {
    "F8_E4M3": lambda: fp8(ml_dtypes.float8_e4m3fn, 400),
    "F8_E5M2": lambda: fp8(ml_dtypes.float8_e5m2, 400),
    "F8_E4M3FNUZ": lambda: fp8(ml_dtypes.float8_e4m3fnuz, 200),
    "F8_E5M2FNUZ": lambda: fp8(ml_dtypes.float8_e5m2fnuz, 400),
    "FP4": lambda: bitsandbytes(FP4),
    "NF4": lambda: bitsandbytes(NF4),
    "NVFP4": lambda: microscaled(16, lambda s: s.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)),
    # ggml's scale is a power of two that brings the largest number between 4 and 8.
    "MXFP4": lambda: microscaled(32, lambda s: np.exp2(np.floor(np.log2(s * 6)) - 2).astype(np.float32)),
}


def held(rounding, numbers):
    return float(np.mean((rounding.low <= numbers) & (numbers <= rounding.high)))


@pytest.mark.parametrize("dtype", STORED)
def test_intervals_of_small_floats_contain_the_originals_and_few_other_numbers(dtype):
    rounding = infer_rounding(STORED[dtype](), dtype)
    assert rounding.coarse
    assert held(rounding, WEIGHT) >= 0.998
    assert held(rounding, WEIGHT + np.random.default_rng(1).normal(size=WEIGHT.shape) * rounding.width / 2) < 0.9


@pytest.mark.parametrize("shape", [(5, 48), (12, 36), (3, 49)])
def test_width_need_not_be_a_multiple_of_the_block(shape):
    """Such rows occur in bitsandbytes."""
    rounding = infer_rounding(WEIGHT[: shape[0], : shape[1]], "NF4")
    assert rounding.low.shape == rounding.high.shape == shape


@pytest.mark.parametrize("dtype", ["F32", "Q8_0"])
def test_block_of_equal_numbers_is_inside_its_own_interval(dtype):
    rows = np.where(np.arange(64) < 32, 0, np.round(WEIGHT[:, :64] * 30) / 30)
    rounding = infer_rounding(rows.astype(np.float32), dtype)
    assert held(rounding, rows.astype(np.float32)) == 1
    assert np.isfinite(rounding.low).all()
