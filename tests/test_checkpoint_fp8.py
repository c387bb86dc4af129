"""FP8 weights with scales become float32; other quantised checkpoints are refused by name."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import llama_tensors, write_config, write_llama, write_safetensors

from jcrosslora.checkpoint import open_base
from jcrosslora.errors import CheckpointError

NAME = "model.layers.0.mlp.gate_proj.weight"  # (24, 16)
QWEN = {"quant_method": "fp8", "weight_block_size": [16, 8], "activation_scheme": "dynamic"}


def fp8_llama(folder: Path, scale_name: str | None, scale, settings, dtype=ml_dtypes.float8_e4m3fn) -> np.ndarray:
    """Write a Llama whose `NAME` is FP8; return the FP8 values as float64."""
    tensors = {name: ("F32", array) for name, array in llama_tensors().items()}
    weight = tensors[NAME][1].astype(dtype)
    tensors[NAME] = ("F8_E5M2" if dtype is ml_dtypes.float8_e5m2 else "F8_E4M3", weight)
    if scale_name:
        tensors[NAME + scale_name] = ("F32", np.asarray(scale, np.float32))
    write_config(folder, quantization_config=settings)
    write_safetensors(folder / "model.safetensors", tensors)
    return weight.astype(np.float64)


def expand(scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.array([[scale[i // rows, j // columns] for j in range(16)] for i in range(24)])


RNG = np.random.default_rng(3)
PER_ROW = RNG.uniform(0.5, 2, (24, 1))
BLOCKS = RNG.uniform(0.5, 2, (2, 2))
EVEN_BLOCKS = RNG.uniform(0.5, 2, (3, 4))
CASES = {
    "tensor": (np.float32(0.25), {"quant_method": "fp8"}, np.full((24, 16), 0.25)),
    "tensor of one": (np.array([0.25]), {"quant_method": "fp8"}, np.full((24, 16), 0.25)),
    "row": (PER_ROW, {"quant_method": "compressed-tensors", "format": "float-quantized"}, PER_ROW * np.ones((24, 16))),
    "row, flat": (PER_ROW[:, 0], {"quant_method": "fbgemm_fp8"}, PER_ROW * np.ones((24, 16))),
    # 24 rows in blocks of 16: the last block is incomplete.
    "stated blocks": (BLOCKS, QWEN, expand(BLOCKS, 16, 8)),
    "blocks by ratio": (EVEN_BLOCKS, {"quant_method": "fp8"}, expand(EVEN_BLOCKS, 8, 4)),
}


@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("case", CASES)
def test_scales(tmp_path: Path, case: str, dtype, suffix: str):
    scale, settings, expected = CASES[case]
    values = fp8_llama(tmp_path, suffix, scale, settings, dtype)
    read = open_base(tmp_path).weight("model.layers.0.mlp.gate_proj")
    assert read.dtype == np.float32
    assert np.allclose(read, values * expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (24, 16, 1), (5,), (0, 4)])
def test_a_scale_that_does_not_fit_the_weight_is_refused(tmp_path: Path, shape: tuple[int, ...]):
    fp8_llama(tmp_path, "_scale", np.ones(shape), {"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="FP8 scale of shape"):
        open_base(tmp_path)


def test_rows_are_dequantised_alone(tmp_path: Path):
    values = fp8_llama(tmp_path, "_scale_inv", BLOCKS, QWEN)
    ids = np.array([23, 0, 15, 16, 16])
    assert np.allclose(open_base(tmp_path).rows(NAME, ids), (values * expand(BLOCKS, 16, 8))[ids], rtol=1e-6)


def test_fp8_without_scale_is_read_as_values_in_a_checkpoint_without_quantisation(tmp_path: Path):
    values = fp8_llama(tmp_path, None, None, None)
    assert np.array_equal(open_base(tmp_path).tensor(NAME).astype(np.float64), values)


def test_fp8_without_scale_is_refused_in_a_quantised_checkpoint(tmp_path: Path):
    fp8_llama(tmp_path, None, None, QWEN)
    with pytest.raises(CheckpointError, match=f"'{NAME}' has no scale"):
        open_base(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "'gptq'.*'marlin'"),
        ({"quant_method": "gptq", "pack_dtype": "int8"}, "'gptq'.*'int8'"),
        ({"quant_method": "awq", "version": "gemv"}, "'awq'.*'gemv'"),
        ({"quant_method": "awq", "bits": 3}, "'awq'.*3 bits"),
        ({"quant_method": "aqlm"}, "'aqlm'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized", "transform_config": {"a": 1}}, "rotated"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "sparsity_config": {"format": "sparse-24"},
            },
            "sparse-24",
        ),
        ({"bits": 4}, "None"),
        ("quip", "'quip'"),
        (["x"], "x"),
    ],
)
def test_other_quantisation_is_refused_by_name(tmp_path: Path, settings, named: str):
    with pytest.raises(CheckpointError, match=named) as error:
        open_base(write_llama(tmp_path, quantization_config=settings))
    assert "are not supported" in str(error.value)
    assert "GPTQ" in str(error.value)
    assert "use the unquantised checkpoint" in str(error.value)
