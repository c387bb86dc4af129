"""LoRA-X: changes of a base's singular values as an adapter, against the formula by LAPACK."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_bases import delta, write_llama
from tiny_models import save_tiny

import jcrosslora as jcl
from jcrosslora.adapter import lora_x_update
from jcrosslora.errors import AdapterError, CheckpointError

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
RNG = np.random.default_rng(0)
D = RNG.normal(size=5).astype(np.float32)
MATRIX = RNG.normal(size=(5, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(write_llama(tmp_path_factory.mktemp("base") / "b", layers=2))


def svd(base, name):
    u, _, vt = np.linalg.svd(base.stored_weight(name).astype(np.float64), full_matrices=False)
    return u[:, :5], vt[:5].T


def test_changed_singular_values_are_an_update_whatever_the_signs(base, tmp_path):
    adapter = lora_x_update(base, {Q: D, DOWN: 2 * D})
    for name, change in ((Q, D), (DOWN, 2 * D)):
        u, v = svd(base, name)
        np.testing.assert_allclose(delta(adapter.modules[name]), u * change @ v.T, rtol=0, atol=1e-5)
        s = np.linalg.svd(base.weight(name) + delta(lora_x_update(base, {name: np.abs(change)}).modules[name]))[1]
        np.testing.assert_allclose(s.sum() - np.linalg.svd(base.weight(name))[1].sum(), np.abs(change).sum(), atol=1e-4)
    back = jcl.load_adapter(jcl.save_adapter(adapter, tmp_path / "o", base=base))
    np.testing.assert_allclose(delta(back.modules[Q]), delta(adapter.modules[Q]), rtol=0, atol=1e-6)


def test_a_matrix_of_changes_uses_the_given_vectors(base):
    u, v = svd(base, Q)
    turned = u * [1, -1, 1, 1, -1], v * [1, 1, -1, 1, -1]
    for vectors in ((u, v), turned):
        adapter = lora_x_update(base, {Q: MATRIX}, {Q: vectors})
        np.testing.assert_allclose(delta(adapter.modules[Q]), vectors[0] @ MATRIX @ vectors[1].T, rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match="signs of the singular vectors"):
        lora_x_update(base, {Q: MATRIX})


def test_a_fused_matrix_has_singular_values_of_its_own(tmp_path):
    base, name = jcl.open_base(save_tiny("phi3", tmp_path / "b")), "model.layers.0.self_attn.qkv_proj"
    u, v = svd(base, name)
    np.testing.assert_allclose(delta(lora_x_update(base, {name: D}).modules[name]), u * D @ v.T, rtol=0, atol=1e-5)


def test_invalid_changes_are_refused(base, tmp_path):
    u, v = svd(base, Q)
    for change in (
        np.zeros((5, 4)),
        np.zeros(0),
        np.zeros(49),
        np.float32(1),
        np.array([1, np.nan]),
        np.zeros((2, 2, 2)),
    ):
        with pytest.raises(AdapterError, match=r"has a change of shape"):
            lora_x_update(base, {Q: np.asarray(change)})
    with pytest.raises(AdapterError, match=r"has U of shape \[48, 4\]"):
        lora_x_update(base, {Q: D}, {Q: (u[:, :4], v)})
    with pytest.raises(CheckpointError, match="no_proj"):
        lora_x_update(base, {"model.layers.0.self_attn.no_proj": D})


def test_vectors_of_close_singular_values_are_refused(tmp_path):
    write_llama(tmp_path / "b", layers=1)
    path = tmp_path / "b" / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.weight"] = np.eye(48, dtype=np.float32)
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="lie too close together"):
        lora_x_update(jcl.open_base(tmp_path / "b"), {Q: D})
