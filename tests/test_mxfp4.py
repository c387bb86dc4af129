"""Experts in MXFP4, as gpt-oss is published: transformers and the gguf package are the oracles."""

import json

import numpy as np
import pytest
from checkpoint_files import write_safetensors
from dense_models import random_model
from expert_models import COUNTS, SHORT
from gguf_files import gguf, write_gguf
from gguf_forms import SPARSE_FORMS, metadata_of, stored_tensors
from tiny_models import torch

import jcrosslora as jcl
from jcrosslora.errors import CheckpointError

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "sliding_window": 6, "head_dim": 16}
MATRICES = ("gate_up", "down")


@pytest.fixture(scope="module")
def model():
    return random_model("gpt_oss", COUNTS | SIZES | {"rope_parameters": SHORT})


def quantised(weight: np.ndarray) -> np.ndarray:
    """Quantise (E, O, I) by the gguf package, (E, O, I / 32 * 17) bytes."""
    return gguf.quants.quantize(np.ascontiguousarray(weight), gguf.GGMLQuantizationType.MXFP4)


def split(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the blocks and scales of transformers for bytes of GGUF, which keep the halves of a group apart."""
    groups = packed.reshape(*packed.shape[:-1], -1, 17)
    low, high = groups[..., 1:] & 0x0F, groups[..., 1:] >> 4
    numbers = np.concatenate([low, high], axis=-1)
    return numbers[..., ::2] | numbers[..., 1::2] << 4, groups[..., 0]


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Write the model as it is published; return the folder, and the blocks and scales by name."""
    folder, tensors, packed = tmp_path_factory.mktemp("mxfp4"), {}, {}
    for name, tensor in model.state_dict().items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = "F32", tensor.numpy()
            continue
        packed[name] = split(quantised(tensor.numpy().swapaxes(1, 2)))
        tensors |= {f"{name}_{part}": ("U8", one) for part, one in zip(("blocks", "scales"), packed[name], strict=True)}
    write_safetensors(folder / "model.safetensors", tensors)
    config = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, packed


def test_experts_equal_what_transformers_makes_of_them(folder):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path, packed = folder
    base = jcl.open_base(path)
    for layer in range(2):
        for matrix in MATRICES:
            parts = map(torch.from_numpy, packed[f"model.layers.{layer}.mlp.experts.{matrix}_proj"])
            wanted = convert_moe_packed_tensors(*parts, dtype=torch.float32).numpy().swapaxes(1, 2)
            if matrix == "gate_up":
                wanted = np.concatenate([wanted[:, ::2], wanted[:, 1::2]], axis=1)
            np.testing.assert_array_equal(base.experts.tensor(layer, matrix), wanted)
            rows = np.array([0, 7, wanted.shape[1] - 1])
            np.testing.assert_array_equal(base.experts.rows(layer, matrix, 3, rows), wanted[3, rows])
            assert base.experts.dtype(layer, matrix) == "MXFP4"


def test_a_gguf_file_holds_the_same_experts(folder, model, tmp_path):
    form = SPARSE_FORMS["gpt_oss"]
    stored = stored_tensors(model, form)
    for name in [name for name in stored if name.endswith("exps.weight")]:
        stored[name] = stored[name][0], gguf.GGMLQuantizationType.MXFP4
    path = write_gguf(tmp_path / "model.gguf", form.arch, metadata_of(model, form), stored)
    base, published = jcl.open_base(path), jcl.open_base(folder[0])
    for matrix in MATRICES:
        found = base.experts.tensor(1, matrix)
        np.testing.assert_array_equal(found, published.experts.tensor(1, matrix))
        rows = np.array([0, 7, found.shape[1] - 1])
        np.testing.assert_array_equal(base.experts.rows(1, matrix, 2, rows), found[2, rows])
        assert base.experts.dtype(1, matrix) == "MXFP4"
    assert jcl.compare_bases(base, published).words == ("same",)


def test_blocks_without_their_scales_are_refused(folder, tmp_path):
    path, packed = folder
    blocks, scales = packed["model.layers.0.mlp.experts.down_proj"]
    tensors = {name: ("F32", tensor) for name, tensor in _others(path).items()}
    name = "model.layers.0.mlp.experts.down_proj"
    tensors |= {f"{name}_blocks": ("U8", blocks), f"{name}_scales": ("U8", scales[:, :-1])}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(
        CheckpointError, match=r"down_proj cannot be read: blocks of shape \[5, 64, 1, 16\] have scales"
    ):
        jcl.open_base(tmp_path)


def _others(path) -> dict[str, np.ndarray]:
    base = jcl.open_base(path)
    return {name: base.tensor(name) for name in base.store.names() if not name.endswith("_blocks")}
