"""Cohere 2 and Hunyuan with experts beside the decoder's pass: gradients, relations of bases, adapters of all parts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from dense_models import random_model
from expert_models import COHERE2, EXPERT_VARIANTS, HUNYUAN
from full_set import full_except
from gradients_of_both import gradients_of_both
from passes_of_both import run, theirs
from rewritten_base import rewritten
from tiny_models import torch

import jcrosslora as jcl
from jcrosslora.checkpoint import ROLE_PATHS, holder_of
from jcrosslora.decoder import stack_adapter
from jcrosslora.errors import CheckpointError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 13)).astype(np.int32)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
WIDE = {"hidden_size": 48}
# The first layer of Cohere 2 is dense, and of another width than an expert.
MODELS = {
    "cohere2_moe": COHERE2 | WIDE | {"num_shared_experts": 2, "expert_selection_fn": "sigmoid"},
    "hunyuan_v1_moe": HUNYUAN | WIDE | {"num_hidden_layers": 4, "moe_topk": 3},
}
ORDER = [4, 2, 0, 5, 1, 3]


def adapted(model, targets=TARGETS, parameters=PARAMETERS):
    """Put an adapter of peft on a model."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), init_lora_weights=False)
    config.target_parameters = list(parameters)
    return peft.get_peft_model(model, config).eval()


@pytest.fixture(scope="module", params=full_except(MODELS, ["cohere2_moe"]))
def case(request, tmp_path_factory):
    """A base and an adapter of peft of its linear modules and experts."""
    folder = tmp_path_factory.mktemp(request.param)
    random_model(request.param, MODELS[request.param]).save_pretrained(folder / "base")
    model = adapted(random_model(request.param, MODELS[request.param]))
    model.save_pretrained(folder / "adapter")
    base = jcl.open_base(folder / "base")
    return SimpleNamespace(
        folder=folder, base=base, adapter=jcl.load_adapter(folder / "adapter", base), wanted=theirs(model, TOKENS)
    )


def changed(case, out, change, layers=None):
    """Write a base again with these of its layers, other names and other tensors."""
    config = json.loads((case.folder / "base" / "config.json").read_text())
    layers = range(config["num_hidden_layers"]) if layers is None else layers
    listed = config.keys() & {"layer_types", "mlp_layer_types"}
    lists = {key: [config[key][layer] for layer in layers] for key in listed}
    return rewritten(case.folder / "base", out, lists, layers, change)


def same(name, x):
    return name, x


def permuted(name, x):
    if name.endswith(("mlp.gate.weight", "mlp.gate.wg.weight")):
        return name, x[ORDER]
    head, _, tail = name.partition(".experts.")
    if not tail:
        return name, x
    expert, _, path = tail.partition(".")
    return f"{head}.experts.{ORDER.index(int(expert))}.{path}", x


def trained(name, x):
    noise = 0.01 * np.random.default_rng(3).normal(size=x.shape).astype(np.float32)
    return name, x + noise if "experts." in name else x


@pytest.mark.parametrize(
    ("change", "layers", "words", "method"),
    [
        (same, None, ("same",), "copy"),
        (permuted, None, ("permuted",), "copy"),
        (trained, None, ("further trained",), "interpolated-copy"),
        (same, (0, 2, 3), ("pruned",), "select"),
    ],
)
def test_relations_of_bases_are_recognised(case, tmp_path, change, layers, words, method):
    found = jcl.compare_bases(case.base, changed(case, tmp_path, change, layers))
    assert found.words == words, found.sentence
    assert found.choice.method == method, found.choice.reason
    assert not any("layer_types" in note for note in found.notes)  # which the layers show
    # Of a dense layer, which Hunyuan does not have.
    neurons = [(part.found, part.target, part.source) for part in found.parts if part.name == "neurons"]
    assert neurons == ([(20, 20, 20)] if "dense" in case.base.config.get("mlp_layer_types", ()) else [])


@pytest.mark.full
def test_an_adapter_goes_with_its_experts_and_layers(case, tmp_path):
    (tmp_path / "permuted").mkdir()
    (tmp_path / "fewer").mkdir()
    other = changed(case, tmp_path / "permuted", permuted)
    moved = jcl.transfer(case.adapter, case.base, other, cache=False, effect="never")
    assert moved.report.recipe.method == "copy"
    np.testing.assert_allclose(run(other, TOKENS, moved.adapter), case.wanted, **CLOSE)
    fewer = changed(case, tmp_path / "fewer", same, (0, 2, 3))
    moved = jcl.transfer(case.adapter, case.base, fewer, cache=False, effect="never")
    assert moved.report.recipe.method == "select"
    kept = {update.name: update for update in case.adapter.experts}
    assert {update.layer for update in moved.adapter.experts} == set(fewer.layers_with("router"))
    for update in moved.adapter.experts:
        old = kept[update.name.replace(f"layers.{update.layer}.", f"layers.{(0, 2, 3)[update.layer]}.")]
        np.testing.assert_allclose(update.b @ update.a, old.b @ old.a, **CLOSE)


def test_an_update_of_the_router_of_hunyuan_is_named_as_left(tmp_path):
    model = random_model("hunyuan_v1_moe", MODELS["hunyuan_v1_moe"])
    model.save_pretrained(tmp_path / "base")
    adapted(model, ["q_proj", "wg"], ()).save_pretrained(tmp_path / "adapter")
    found = jcl.load_adapter(tmp_path / "adapter", jcl.open_base(tmp_path / "base"))
    assert {name.rpartition(".")[2] for name in found.modules} == {"q_proj"}
    assert any("router" in text and "mlp.gate.wg" in text for text in found.info.ignored)


@pytest.mark.parametrize("name", full_except(["cohere2_moe", "cohere2_moe-sum", "hunyuan_v1_moe"], ["cohere2_moe"]))
def test_gradients_through_the_choice_of_experts_are_those_of_torch(name, tmp_path):
    random_model(*EXPERT_VARIANTS[name]).save_pretrained(tmp_path)
    model = adapted(random_model(*EXPERT_VARIANTS[name]))
    model.save_pretrained(tmp_path / "adapter")
    base = jcl.open_base(tmp_path)
    stacked = stack_adapter(jcl.load_adapter(tmp_path / "adapter", base), base)
    found, wanted = gradients_of_both(model, base, stacked, TOKENS)
    seen = set()
    for role in found.roles.keys() & ROLE_PATHS.keys():
        factors = found.roles[role]
        for layer, a, b in zip(base.layers_with(role), factors.a, factors.b, strict=True):
            for side, own in (("A", a), ("B", 1.5 * b)):  # the scale is part of our B
                module = f"base_model.model.model.layers.{layer}.{holder_of(base.family, role)}"
                key = f"{module}.lora_{side}.default.weight"
                np.testing.assert_allclose(own, wanted[key], atol=2e-3, rtol=2e-3)
                seen.add(key)
    for role, inner in (("gate_up", ".base_layer"), ("down", "")):
        factors = found.roles[role]
        for layer, a, b in zip(base.layers_with("router"), factors.a, factors.b, strict=True):
            # All experts side by side; in B they take turns.
            sides = {"A": a.reshape(-1, a.shape[2]), "B": 1.5 * b.transpose(1, 2, 0).reshape(b.shape[1], -1)}
            for side, own in sides.items():
                key = f"base_model.model.model.layers.{layer}.mlp.experts{inner}.lora_{side}.default.weight"
                np.testing.assert_allclose(own, wanted[key], atol=2e-3, rtol=2e-3)
                seen.add(key)
    assert seen == set(wanted)


@pytest.mark.parametrize(("name", "factor"), [("cohere2_moe", 0.5), ("cohere2_moe-sum", 1.0), ("hunyuan_v1_moe", 1.0)])
def test_shared_experts_that_are_averaged_write_half(name, factor, tmp_path):
    random_model(*EXPERT_VARIANTS[name]).save_pretrained(tmp_path)
    base = jcl.open_base(tmp_path)
    path = holder_of(base.family, "shared_down_proj")
    module = next(one for one in base.modules.values() if one.role == "shared_down_proj" and path in one.tensor)
    np.testing.assert_array_equal(base.residual_gain(module.name), np.full(32, factor, np.float32))


@pytest.mark.parametrize("stated", [["dense"], ["dense", "moe", "sparse", "sparse", "sparse"], "sparse"])
def test_kinds_of_mlps_that_cannot_be_read_are_refused(stated, tmp_path):
    random_model(*EXPERT_VARIANTS["cohere2_moe"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_layer_types": stated}))
    with pytest.raises(CheckpointError, match="config key 'mlp_layer_types' is "):
        jcl.open_base(tmp_path)
