"""What is read off two bases before anything is aligned: sums over the shared vocabulary, and stacks of weights."""

import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import write_safetensors
from safetensors.numpy import load_file, save_file
from tiny_bases import write_llama

import jcrosslora as jcl
from jcrosslora.checkpoint.weight_stacks import load_stack
from jcrosslora.errors import CheckpointError
from jcrosslora.maps.base_pair import BasePair

EMBEDDING = "model.embed_tokens.weight"
SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 4, "intermediate": 8, "layers": 1}


def with_table(folder, change, **dims):
    """A base whose embedding has been changed."""
    path = write_llama(folder, **SMALL, **dims) / "model.safetensors"
    tensors = load_file(path)
    tensors[EMBEDDING] = change(tensors[EMBEDDING]).astype(np.float32)
    save_file(tensors, path)
    return jcl.open_base(folder)


@pytest.mark.parametrize("shared", [32, 4095, 4096, 4097, 8192])
def test_the_moments_of_the_shared_vocabulary_are_those_of_float64(tmp_path, shared):
    """Whatever the number of tokens, those that only one base has left out, with means far from zero."""
    source = with_table(tmp_path / "s", lambda x: 0.02 * x + 3, vocab=shared + 5, hidden=12)
    target = with_table(tmp_path / "t", lambda x: x - 1, vocab=shared + 9, hidden=20, first_token=5, seed=1)
    vocabulary, reason = BasePair(source, target).vocabulary
    assert vocabulary is not None, reason
    assert vocabulary.count == shared
    x, y = source.tensor(EMBEDDING)[5:].astype(np.float64), target.tensor(EMBEDDING)[:shared].astype(np.float64)
    mean_src, mean_tgt = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean_src, y - mean_tgt
    for found, wanted in (
        (vocabulary.gram_src, x.T @ x / shared),
        (vocabulary.gram_tgt, y.T @ y / shared),
    ):
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(vocabulary.cross, x.T @ y / shared, rtol=0, atol=2e-6 * x.std() * y.std())


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 1e25])
def test_a_table_that_has_no_moments_is_one_error_and_no_warning(tmp_path, value):
    def spoil(table):
        table[3:5, 2] = value
        return table

    plain = with_table(tmp_path / "plain", lambda x: x, vocab=40, hidden=12)
    spoilt = with_table(tmp_path / "spoilt", spoil, vocab=40, hidden=12)
    for pair in ((plain, spoilt), (spoilt, plain)):
        with pytest.raises(CheckpointError, match=r"embedding table of .*download"):
            _ = BasePair(*pair).vocabulary


def test_weights_of_several_dtypes_are_stacked(tmp_path):
    """numpy has no common type of bfloat16 and float16."""
    folder = write_llama(tmp_path / "s")
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    kinds = ("BF16", ml_dtypes.bfloat16), ("F16", np.float16), ("F32", np.float32)
    stored = {name: ("F32", array) for name, array in load_file(folder / "model.safetensors").items()}
    for name, (dtype, kind) in zip(names, kinds, strict=True):
        stored[f"{name}.weight"] = dtype, stored[f"{name}.weight"][1].astype(kind)
    write_safetensors(folder / "model.safetensors", stored)
    base = jcl.open_base(folder)
    assert len({base.modules[name].dtype for name in names}) == len(names)
    for name, weight in zip(names, load_stack(base, names), strict=False):
        np.testing.assert_array_equal(weight, base.weight(name).astype(np.float32))
