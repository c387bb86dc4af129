"""A copy with what the difference of the bases does on texts, for adapters that were trained on rounded weights."""

import numpy as np
import pytest
import safetensors.numpy
from probe_bases import CORPUS, write_base
from tiny_bases import delta, random_adapter
from whole_passes import log_probs

import jcrosslora as jcl
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import load_model, stack_adapter

HIDDEN = 48


def rounded(x):
    """Round blocks of 16 numbers to 15 levels."""
    blocks = x.reshape(-1, 16)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
    return (np.round(blocks / scale) * scale).reshape(x.shape)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base in four bits, and the base."""
    full, quantised = (write_base(tmp_path_factory.mktemp(name), 30, layers=2) for name in ("full", "quantised"))
    tensors = safetensors.numpy.load_file(full / "model.safetensors")
    changed = {name: rounded(x) if "_proj" in name else x for name, x in tensors.items()}
    safetensors.numpy.save_file(changed, quantised / "model.safetensors")
    return jcl.open_base(quantised), jcl.open_base(full)


@pytest.fixture(scope="module")
def adapter(bases):
    return random_adapter(bases[0], scale=0.05, roles=("q_proj", "down_proj"))


def move(adapter, bases, method, **settings):
    chosen = jcl.methods.make_method(method, settings)
    return jcl.transfer(adapter, *bases, chosen, prompts=CORPUS, cache=False, effect="never")


def divergence(bases, adapter, moved):
    """KL(source with its adapter || target with the moved one) on the texts, nats a position."""
    pairs = zip(bases, (adapter, moved), strict=True)
    models = [(load_model(base, np.float32), stack_adapter(one, base)) for base, one in pairs]
    found = []
    for text in CORPUS:
        ids = load_tokenizer(bases[0]).encode(text, special=False).ids
        source, target = (log_probs(model, ids, one) for model, one in models)
        found.append(np.sum(np.exp(source) * (source - target), axis=-1))
    return float(np.concatenate(found).mean())


def test_the_target_with_all_ranks_has_the_weights_that_the_adapter_was_trained_for(bases, adapter):
    found = move(adapter, bases, "compensated-copy", svd_rank=HIDDEN).adapter
    assert list(found.modules) == list(bases[1].modules)
    for name, factors in found.modules.items():
        source, target = (np.asarray(base.weight(name), np.float64) for base in bases)
        wanted = source - target + (delta(adapter.modules[name]) if name in adapter.modules else 0)
        np.testing.assert_allclose(delta(factors), wanted, rtol=1e-3, atol=1e-5 * np.abs(source).max(), err_msg=name)


def test_a_small_rank_brings_more_on_text_than_the_nearest_update_of_that_rank(bases, adapter):
    """The oracle is the source, whose weights the adapter was trained for."""
    by_text = move(adapter, bases, "compensated-copy", svd_rank=4)
    by_weights = move(adapter, bases, "interpolated-copy", interpolation=1.0, svd_rank=4)
    left = {one: divergence(bases, adapter, one.adapter) for one in (by_text, by_weights)}
    copied = divergence(bases, adapter, adapter)
    assert left[by_text] < 0.9 * left[by_weights] < 0.9 * copied, (left.values(), copied)
    assert all(factors.rank <= 4 + 4 for factors in by_text.adapter.modules.values())
    assert "ranks up to 4" in by_text.report.added
    assert by_text.report.added.endswith("of what it does on the texts")
