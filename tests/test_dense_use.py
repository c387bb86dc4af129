"""Families whose layers differ from Llama's, in the places beside the decoder that go through modules and norms."""

import io

import numpy as np
import pytest
from dense_models import random_model
from rich.console import Console
from tiny_bases import delta, random_adapter, write_llama
from tiny_models import torch, transformers

import jcrosslora as jcl
from jcrosslora.checkpoint import roles_named
from jcrosslora.decoder import load_model, settings_of
from jcrosslora.distill.run import distill
from jcrosslora.distill.settings import DistillSettings
from jcrosslora.errors import UsageError
from jcrosslora.report import print_report
from jcrosslora.training import TrainingSettings, first_factors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def phi():
    """A model without gates, with names of its own for three modules."""
    return random_model("phi", {"partial_rotary_factor": 0.5})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return jcl.open_base(write_llama(tmp_path_factory.mktemp("llama"), layers=2))


def test_a_transfer_lists_the_gates_that_the_target_lacks(llama, phi):
    adapter, target = random_adapter(llama, rank=2, scale=0.1), jcl.open_base(phi)
    result = jcl.transfer(adapter, llama, target, "cross-lora", cache=False)
    assert set(result.adapter.modules) == set(target.modules)
    left = [item.source for item in result.report.unmapped_sources]
    assert left == [name for name in llama.modules if name.endswith("gate_proj")]
    console = Console(file=io.StringIO(), width=200)
    print_report(result.report, console)
    assert "2 source modules feed no target module (gate_proj of layers 0, 1)" in console.file.getvalue()
    back = jcl.transfer(result.adapter, target, llama, "cross-lora", cache=False)
    assert set(back.report.unmapped_targets) == set(left)


def test_the_merged_model_equals_that_of_peft(phi, tmp_path):
    phi.save_pretrained(tmp_path / "base")
    base = jcl.open_base(tmp_path / "base")
    adapter = random_adapter(base, rank=2, scale=0.1)
    out = jcl.save_adapter(adapter, tmp_path / "adapter", base=base)
    jcl.merge(jcl.MergeSettings(str(tmp_path / "base"), str(out), str(tmp_path / "merged")))
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(plain, str(out)).merge_and_unload().state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)
    changed = found["model.layers.0.mlp.fc1.weight"] - phi.state_dict()["model.layers.0.mlp.fc1.weight"]
    np.testing.assert_allclose(changed, delta(adapter.modules["model.layers.0.mlp.up_proj"]), atol=1e-5)


def test_a_base_is_compared_with_itself(phi):
    base = jcl.open_base(phi)
    assert jcl.compare_bases(base, jcl.open_base(phi)).words == ("same",)


def test_bases_with_and_without_gates_are_compared(llama, phi):
    assert jcl.compare_bases(llama, jcl.open_base(phi)).words == ("unrelated",)


def test_training_starts_with_the_modules_that_there_are(phi):
    base = jcl.open_base(phi)
    assert set(first_factors(base, TrainingSettings(rank=2)).roles) == set(base.architecture.role_shapes)
    with pytest.raises(UsageError, match="modules gate_proj: there are none of these, only"):
        first_factors(base, TrainingSettings(rank=2, modules=("gate_proj",)))


def test_a_name_stands_for_all_modules_that_are_called_so(phi):
    every = {"qg_proj", "q_proj", "global_q_proj", "kv_shared_q_proj", "k_proj", "shared_gate_proj"}
    called = every - {"k_proj", "shared_gate_proj"}
    assert set(roles_named(("q_proj",), every)) == called
    assert roles_named(("global_q_proj",), every) == ["global_q_proj"]
    assert set(roles_named(None, every)) == every
    with pytest.raises(UsageError, match="there are none of these, only"):
        distill(jcl.open_base(phi), jcl.open_base(phi), settings=DistillSettings(roles=("gate_proj",)))


def test_a_bias_is_read_by_the_logical_name(phi):
    base = jcl.open_base(phi)
    wanted = phi.state_dict()["model.layers.1.self_attn.dense.bias"].numpy()
    np.testing.assert_array_equal(base.bias("model.layers.1.self_attn.o_proj"), wanted)
    assert base.bias("model.layers.1.mlp.up_proj").shape == (40,)


def test_the_gain_of_what_granite_adds_is_its_factor():
    base = jcl.open_base(random_model("granite", {"residual_multiplier": 0.3}))
    np.testing.assert_allclose(base.residual_gain("model.layers.0.mlp.down_proj"), np.full(32, 0.3), rtol=1e-6)
    params = load_model(base).params
    np.testing.assert_array_equal(base.residual_gain("model.layers.0.mlp.up_proj"), params.norms["mlp"][0])
    assert settings_of(base).residual_scale == 0.3
