"""Further training in all weights: its gradient is that of the factors' oracle, and what it adds is exact."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from adapter_folders import delta
from probe_bases import QUESTIONS, write_base

sys.path.append(str(Path(__file__).parents[1] / "experiments"))
import dense_training
from dense_training import train_dense

import jcrosslora as jcl
from jcrosslora.adapter import save_adapter
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import load_model
from jcrosslora.evaluate import score
from jcrosslora.training import Plan, TrainingSettings, encode, first_factors, loss_and_gradient

SETTINGS = TrainingSettings(steps=6, batch=3, rate=5e-3, rank=3, alpha=6.0, seed=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return jcl.open_base(write_base(tmp_path_factory.mktemp("base"), 60, bos=True, layers=2))


def test_the_gradient_agrees_with_that_of_initial_factors(base):
    """With B = 0 the derivative by B is that by the weight, times A transposed and the scale."""
    model, factors = load_model(base), first_factors(base, SETTINGS)
    batch = Plan([encode(load_tokenizer(base), one) for one in QUESTIONS], 3, 1, 0).batch(0)
    loss, gradients = loss_and_gradient(model, factors, batch, 2.0)
    weights = {role: model.params.weights[role] for role in factors.roles}
    dense, found = dense_training._loss_and_gradient(model, weights, batch)
    np.testing.assert_allclose(dense, loss, rtol=1e-6)
    for role, one in gradients.roles.items():
        wanted = 2.0 * np.asarray(found[role]) @ np.asarray(factors.roles[role].a).transpose(0, 2, 1)
        np.testing.assert_allclose(one.b, wanted, rtol=1e-4, atol=1e-6)
        assert np.abs(wanted).max() > 1e-4


def test_the_change_has_full_rank_and_merges_exactly(base, tmp_path):
    change = train_dense(base, QUESTIONS, SETTINGS)
    assert change.modules.keys() == base.modules.keys()
    for factors in change.modules.values():
        assert factors.rank == min(factors.shape) == np.linalg.matrix_rank(delta(factors))
    found = score(base, QUESTIONS, [change])
    right = np.arange(len(QUESTIONS)), found.answers
    by_token = -found.log_probs[:, *right].sum(axis=1) / found.tokens[right].sum()
    assert by_token[1] < 0.9 * by_token[0]
    save_adapter(change, tmp_path / "change", base_name=base.name)
    jcl.merge(jcl.MergeSettings(str(base.path), str(tmp_path / "change"), str(tmp_path / "merged"), dtype="float32"))
    merged = jcl.open_base(tmp_path / "merged")
    for name, factors in change.modules.items():
        np.testing.assert_allclose(merged.weight(name), base.weight(name) + delta(factors), rtol=0, atol=1e-7)


def test_a_stopped_run_continues_and_only_its_modules_change(base, tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, modules=("v_proj", "down_proj"))
    whole = train_dense(base, QUESTIONS, settings)
    assert {name.rpartition(".")[2] for name in whole.modules} == {"v_proj", "down_proj"}
    monkeypatch.setattr(dense_training, "_EVERY", 2)
    plain, calls = dense_training._loss_and_gradient, []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(dense_training, "_loss_and_gradient", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_dense(base, QUESTIONS, settings, checkpoints=tmp_path / "states")
    again = train_dense(base, QUESTIONS, settings, checkpoints=tmp_path / "states")
    assert len(calls) == 4 + 4  # from step 2 on
    for name, factors in whole.modules.items():
        np.testing.assert_array_equal(delta(again.modules[name]), delta(factors))
