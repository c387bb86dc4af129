"""Test transfers to a compressed copy of the source: what a copy leaves is mended, where the adapter can be run."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy
from probe_bases import CORPUS, write_base
from tiny_bases import delta, random_adapter
from whole_passes import log_probs

import jcrosslora as jcl
from jcrosslora.adapter import TokenUpdate
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import load_model, stack_adapter
from jcrosslora.methods import Auto
from jcrosslora.session.job import Job
from jcrosslora.session.session import Session
from jcrosslora.session.settings import TransferOptions

HIDDEN = 48


def three_bits(x):
    """Round blocks of 16 numbers to 7 levels."""
    blocks = x.reshape(-1, 16)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 3
    return (np.round(blocks / scale) * scale).reshape(x.shape)


def pruned(x):
    """Set the smaller 30% of the numbers to zero."""
    return np.where(np.abs(x) < np.quantile(np.abs(x), 0.3), np.float32(0), x)


def unchanged(x):
    return x


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("source"), 30, layers=2))


@pytest.fixture(scope="module")
def compressed(source, tmp_path_factory):
    """Return the target that a function makes of every linear weight."""

    def make(change, **dims):
        folder = write_base(tmp_path_factory.mktemp(change.__name__), 30, **{"layers": 2, **dims})
        tensors = safetensors.numpy.load_file(source.path / "model.safetensors")
        own = safetensors.numpy.load_file(folder / "model.safetensors")
        changed = {name: change(x) if "_proj" in name else x for name, x in tensors.items() if name in own}
        safetensors.numpy.save_file(changed, folder / "model.safetensors")
        return jcl.open_base(folder)

    return make


@pytest.fixture(scope="module")
def rounded(compressed):
    return compressed(three_bits)


@pytest.fixture(scope="module")
def adapter(source):
    return random_adapter(source, scale=0.05)


def divergence(source, adapter, target, moved):
    """KL(source with its adapter || target with the moved one) on the prompts, nats a position."""
    found, pairs = [], ((source, adapter), (target, moved))
    models = [(load_model(base, np.float32), stack_adapter(one, base)) for base, one in pairs]
    for text in CORPUS:
        ids = load_tokenizer(source).encode(text, special=False).ids
        sides = [log_probs(model, ids, one) for model, one in models]
        found.append(np.sum(np.exp(sides[0]) * (sides[0] - sides[1]), axis=-1))
    return float(np.concatenate(found).mean())


def move(adapter, source, target, method="auto", prompts=CORPUS, **options):
    if method == "auto":
        method = Auto(completions=96, answer_tokens=8)
    return jcl.transfer(adapter, source, target, method, prompts=prompts, cache=False, effect="never", **options)


def conversations():
    return [[{"role": "user", "content": text}] for text in CORPUS]


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "prompts"),
    [(three_bits, CORPUS), pytest.param(pruned, conversations(), marks=pytest.mark.slow)],
    ids=["three bits", "pruned, conversations"],
)
def test_auto_mends_what_the_compression_costs(source, compressed, adapter, change, prompts):
    target = compressed(change)
    found = move(adapter, source, target, prompts=prompts)
    assert found.report.recipe.method == "distilled-copy"
    assert "fitted to what the adapted source predicts" in found.report.choice
    assert found.report.fit.on_top
    left = divergence(source, adapter, target, found.adapter)
    assert left < 0.95 * divergence(source, adapter, target, adapter)


@pytest.mark.full
def test_parts_of_a_pruned_target_are_fitted_too(source, compressed):
    target = compressed(unchanged, layers=1)
    adapter = random_adapter(source, scale=0.05, roles=("v_proj", "up_proj"))
    found, parts = move(adapter, source, target), move(adapter, source, target, "select")
    assert found.report.recipe.method == "distilled-select"
    assert "the target lacks some" in found.report.choice
    before, left = (divergence(source, adapter, target, one.adapter) for one in (parts, found))
    assert left < 0.95 * before


def without_a_fit(source, adapter):
    invocation = tuple(load_tokenizer(source).encode("Water", special=False).ids.tolist())
    waiting = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation=invocation))
    return {
        "an aLoRA": (waiting, {}, "acts only after its invocation tokens"),
        "scale": (adapter, {"scale": 0.5}, "a scale or a calibration was asked for"),
        "calibration": (adapter, {"calibrate": "frobenius"}, "a scale or a calibration was asked for"),
    }


@pytest.mark.parametrize("case", ["an aLoRA", "scale", "calibration"])
def test_what_cannot_be_fitted_is_copied_with_the_reason(source, rounded, adapter, case):
    adapter, options, reason = without_a_fit(source, adapter)[case]
    found = move(adapter, source, rounded, prompts=None, **options)
    assert found.report.recipe.method == "copy"
    assert reason in found.report.choice
    assert "what the compression costs remains" in found.report.choice
    for name, factors in adapter.modules.items():
        want = options.get("scale", 1) * delta(factors)
        np.testing.assert_allclose(delta(found.adapter.modules[name]), want, rtol=1e-4, atol=1e-6)


def test_changes_of_the_embedding_are_copied_with_the_reason(source, rounded, adapter):
    """The fit would compare predictions without them."""
    rows = TokenUpdate("embed_tokens", "full", 288, np.array([1]), rows=np.ones((1, HIDDEN), np.float32))
    changed = dataclasses.replace(adapter, tokens=(rows,))
    method, reason = Session(source, rounded).resolve(Job(changed, Auto(), TransferOptions()), changed)
    assert method.name == "copy"
    assert "changes of the embedding and the output head" in reason
