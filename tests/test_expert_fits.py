"""A dense target learns from a source with experts, and a target with experts from a dense source."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from dense_models import random_model
from probe_bases import CORPUS, save_tokenizer, write_base
from tiny_bases import random_adapter

import jcrosslora as jcl
from jcrosslora.adapter import expert_update
from jcrosslora.decoder import load_model
from jcrosslora.distill import DistillSettings
from jcrosslora.distill.run import distill
from jcrosslora.distill.sources.decoder import DecoderSource
from jcrosslora.methods import Distill, FitFacts, Moved

SMALL = DistillSettings(
    fit_rank=4,
    passes=1,
    rate=1e-2,
    completions=48,
    answer_tokens=6,
    discovery=0,
    compared_tokens=400,
    teacher_weight=0.0,
    sure_weight=0.0,
    contrast_weight=1.0,
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A dense base, and one whose first layer is dense and whose others have experts and shared ones."""
    folder = tmp_path_factory.mktemp("bases")
    dense = jcl.open_base(write_base(folder / "dense", 30, bos=True, layers=2))
    vocab = save_tokenizer(folder, 60, True)
    settings = {
        "vocab_size": vocab,
        "num_hidden_layers": 3,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    random_model("glm4_moe", settings).save_pretrained(folder)
    return dense, jcl.open_base(folder)


@pytest.mark.full
@pytest.mark.parametrize("direction", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_bases_with_and_without_experts_learn_from_each_other(bases, direction):
    source, target = bases[::direction]
    adapter = random_adapter(source, roles=("q_proj", "v_proj", "o_proj"), scale=1.0)
    found = distill(source, target, adapter, prompts=CORPUS, settings=SMALL)
    assert found.curve[-1].divergence < found.curve[0].divergence
    assert set(found.adapter.modules) == set(target.modules)


def experts_alone(base):
    rng = np.random.default_rng(5)
    updates = []
    for layer in base.layers_with("router"):
        count, rows, columns = base.experts.shape("down")
        a, b = rng.normal(size=(count, 2, columns)), rng.normal(size=(count, rows, 2))
        updates.append(expert_update(base, layer, "down", a.astype(np.float32), b.astype(np.float32)))
    return jcl.Adapter({}, experts=tuple(updates))


@dataclass(frozen=True)
class Asked(Distill):
    """What a fit is given, in place of the fit."""

    name: ClassVar[str] = "asked"

    def move(self, plan):
        source = DecoderSource.of(plan.source, plan.adapter, model=load_model(plan.source))
        assert {"down"} == set(source.model.adapter.roles)
        assert plan.mapped is None
        return Moved(random_adapter(plan.target, roles=("q_proj",)), fit=FitFacts(note="nothing was fitted"))


def test_a_fit_gets_an_adapter_of_experts_alone(bases):
    dense, sparse = bases
    found = jcl.transfer(experts_alone(sparse), sparse, dense, Asked(), prompts=CORPUS, cache=False, effect="never")
    assert {name.rpartition(".")[2] for name in found.adapter.modules} == {"q_proj"}
    assert not found.adapter.experts
    assert not found.report.unmapped_sources
    assert (found.report.rank_before, found.report.fit) == (2, FitFacts(note="nothing was fitted"))


@dataclass(frozen=True)
class WithExperts(Distill):
    """Updates of experts of the target, in place of a fit."""

    name: ClassVar[str] = "with-experts"

    def move(self, plan):
        modules = random_adapter(plan.target, roles=("q_proj",)).modules
        return Moved(replace(experts_alone(plan.target), modules=modules), fit=FitFacts(note="nothing was fitted"))


def test_updates_of_experts_that_a_fit_returns_are_written(bases, tmp_path):
    dense, sparse = bases
    found = jcl.transfer(random_adapter(dense), dense, sparse, WithExperts(), prompts=CORPUS, effect="never")
    names = {update.name for update in experts_alone(sparse).experts}
    assert {update.name for update in found.adapter.experts} == names
    again = jcl.load_adapter(found.save(tmp_path / "peft", profile="peft"), sparse)
    assert {update.name for update in again.experts} == names
    assert names < found.report.ranks.keys()
    out = found.save(tmp_path / "portable")
    assert "not written: LoRA of experts" in (out / "README.md").read_text()
    assert not names & json.loads((out / "transfer_report.json").read_text())["ranks"].keys()
