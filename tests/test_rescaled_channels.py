"""A base whose channels were rescaled, as AWQ and SmoothQuant do: the same model, and a copy follows the scales."""

import numpy as np
import pytest
from relatives import is_linear, make, noisy, rescaled, shuffled, then, with_neurons, with_stream
from tiny_bases import random_adapter
from whole_passes import scores

import jcrosslora as jcl
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.linalg import channel_scales, rescale

IDS = np.random.default_rng(3).integers(0, 128, 40)


def answers(base, adapter=None):
    model = load_model(base, np.float32)
    return scores(model, IDS, None if adapter is None else stack_adapter(adapter, base))


def move(tmp_path, change, method, family="llama", **dims):
    """Move a random adapter of a random base to the changed base; return both sides with their adapters."""
    made = make(family, **dims)
    source, target = made.write(tmp_path / "source"), change(made).write(tmp_path / "target")
    adapter = random_adapter(source, scale=0.05)
    return (source, adapter), (target, jcl.transfer(adapter, source, target, method, cache=False).adapter)


@pytest.mark.parametrize(
    ("family", "dims"),
    [("llama", {}), ("llama", {"num_key_value_heads": 4}), ("gemma2", {}), ("qwen2", {"num_key_value_heads": 4})],
)
def test_a_copy_computes_what_the_source_does(tmp_path, family, dims):
    (source, adapter), (target, moved) = move(tmp_path, rescaled(0.5), "copy", family, **dims)
    base, wanted = answers(source), answers(source, adapter)
    np.testing.assert_allclose(answers(target), base, atol=1e-3)
    np.testing.assert_allclose(answers(target, moved), wanted, atol=1e-3)
    unchanged = np.abs(answers(target, adapter) - wanted).max()
    assert unchanged > 0.1 * np.abs(wanted - base).max()  # as the update that ignores the scales does not


def test_auto_takes_a_copy_with_the_scales(tmp_path):
    (source, adapter), (target, moved) = move(tmp_path, rescaled(1.0), "auto")
    np.testing.assert_allclose(answers(target, moved), answers(source, adapter), atol=1e-3)


@pytest.mark.parametrize("change", [lambda made: made, lambda made: made.rounded("BF16"), noisy(0.1), noisy(3.0)])
def test_a_copy_of_other_bases_is_the_update_bit_by_bit(tmp_path, change):
    (_, adapter), (_, moved) = move(tmp_path, change, "copy")
    for name, factors in adapter.modules.items():
        np.testing.assert_array_equal(moved.modules[name].a, factors.a)
        np.testing.assert_array_equal(moved.modules[name].b, np.float32(factors.scale) * factors.b)


def test_parts_in_another_order_are_rescaled_too(tmp_path):
    reordered = then(
        rescaled(0.3), with_neurons(lambda layer, count: shuffled(count, layer)), with_stream(shuffled(64, 5))
    )
    (source, adapter), (target, moved) = move(tmp_path, reordered, "select")
    wanted, base = answers(source, adapter), answers(source)
    assert np.abs(answers(target, moved) - wanted).max() < 0.01 * np.abs(wanted - base).max()


def test_the_difference_that_is_added_is_that_of_the_rescaled_source(tmp_path):
    """With the whole difference the weights are the source's with its adapter, up to the scales that noise hides."""
    change = then(rescaled(0.5), noisy(0.05, only=is_linear))
    method = jcl.methods.make_method("interpolated-copy", {"interpolation": 1.0, "svd_rank": 64})
    (source, adapter), (target, moved) = move(tmp_path, change, method)
    copied = jcl.transfer(adapter, source, target, "copy", cache=False).adapter
    wanted = answers(source, adapter)
    errors = [np.linalg.norm(answers(target, one) - wanted) for one in (moved, copied)]
    assert errors[0] < 0.3 * errors[1]


def test_known_columns_are_kept_and_rows_fitted():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 48)).astype(np.float32)
    rows, columns = (np.exp(rng.normal(size=size)).astype(np.float32) for size in weight.shape)
    changed = rescale(weight, rows, columns)
    for known in (None, columns):
        found = channel_scales(weight, changed, known)
        np.testing.assert_allclose(rescale(weight, *found), changed, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(channel_scales(weight, changed, columns)[1], columns)


def test_a_common_scale_is_no_scale_of_channels():
    weight = np.random.default_rng(0).normal(size=(24, 40)).astype(np.float32)
    assert all((scales == 1).all() for scales in channel_scales(weight, 2 * weight))
