"""LoRA of the parameters of experts, against peft: read in both layouts, run, written, and named where it is left."""

import json
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from command_line import main
from dense_models import random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from hybrid_models import HYBRIDS
from safetensors.numpy import load_file, save_file
from tiny_models import torch

import jcrosslora as jcl
from jcrosslora.adapter import check_engines, for_profile
from jcrosslora.architectures import ATTENTION
from jcrosslora.decoder import forward, load_model, logits, stack_adapter
from jcrosslora.errors import AdapterError, OutputError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # peft looks for the patterns of parameters among its modules; the ranks are used all the same.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 9)).astype(np.int32)
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
UNGATED = ["experts.up_proj", "experts.down_proj"]


def run_torch(model):
    # transformers cuts what layers that share keys read, and fails without inputs by layer; not if all is asked for.
    every = {"use_cache": False, "output_hidden_states": True}
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS).long(), **every).logits.numpy()


def run_ours(base, adapter):
    ours, stacked = load_model(base), stack_adapter(adapter, base)
    run = jax.jit(lambda stacked: logits(ours, forward(ours.with_adapter(stacked), TOKENS).hidden))
    return np.asarray(run(stacked))


def make(name, folder, targets=ATTENTION):
    """A model with an adapter that peft made of some modules and of both parameters of the experts."""
    made = random_model(*(EXPERT_VARIANTS | HYBRIDS)[name])
    made.save_pretrained(folder / "base")
    load = partial(type(made).from_pretrained, folder / "base", dtype=torch.float32)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=list(targets),
        target_parameters=UNGATED if name.startswith("nemotron_h") else PARAMETERS,
        init_lora_weights=False,
    )
    config.rank_pattern = {r".*\.down_proj": 3}
    adapted = peft.get_peft_model(load(attn_implementation="eager"), config).eval()
    for name, parameter in adapted.named_parameters():
        if "experts" in name and "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder / "adapter")
    base = jcl.open_base(folder / "base")
    adapter = jcl.load_adapter(folder / "adapter", base)
    return SimpleNamespace(folder=folder, load=load, base=base, adapter=adapter, wanted=run_torch(adapted))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return make("mixtral", tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(
    scope="module",
    params=full_except(
        [
            "mixtral",
            "gpt_oss",
            "granite-experts",
            "lfm2_moe",
            "gemma4-experts",
            "llama4",
            "mistral4",
            "nemotron_h-latent",
            "cohere2_moe",
            "hunyuan_v1_moe",
        ],
        ["mixtral", "gpt_oss", "nemotron_h-latent"],
    ),
)
def case(request, tmp_path_factory):
    if request.param == "mixtral":
        return request.getfixturevalue("mixtral")
    return make(request.param, tmp_path_factory.mktemp(request.param))


def test_an_adapter_of_experts_does_what_it_does_in_peft(case):
    assert not case.adapter.info.ignored
    np.testing.assert_allclose(run_ours(case.base, case.adapter), case.wanted, **CLOSE)
    linear = jcl.Adapter(case.adapter.modules)
    assert np.abs(run_ours(case.base, linear) - case.wanted).max() > 0.05


def test_an_adapter_of_experts_is_written_as_peft_reads_it(case, tmp_path):
    out = jcl.save_adapter(case.adapter, tmp_path / "out", base=case.base, profile="peft")
    again = jcl.load_adapter(out, case.base)
    np.testing.assert_allclose(run_ours(case.base, again), case.wanted, **CLOSE)
    loaded = peft.PeftModel.from_pretrained(case.load(attn_implementation="eager"), str(out)).eval()
    np.testing.assert_allclose(run_torch(loaded), case.wanted, **CLOSE)


def test_merged_experts_are_those_of_peft(case, tmp_path):
    done = jcl.merge(jcl.MergeSettings(str(case.folder / "base"), str(case.folder / "adapter"), str(tmp_path / "m")))
    assert not done.lost
    np.testing.assert_allclose(run_torch(loaded(case, tmp_path / "m")), case.wanted, **CLOSE)


def test_absorbed_experts_and_the_rest_are_the_adapter_in_peft(case, tmp_path, capsys):
    folders = ["--base", str(case.folder / "base"), "--out", str(tmp_path / "o"), "--absorb", str(tmp_path / "b")]
    main(["export", str(case.folder / "adapter"), *folders, "--fail-on", "loss"])
    assert "in the base: LoRA of experts" in capsys.readouterr().out
    both = peft.PeftModel.from_pretrained(loaded(case, tmp_path / "b"), str(tmp_path / "o")).eval()
    np.testing.assert_allclose(run_torch(both), case.wanted, **CLOSE)
    assert {one.engine for one in check_engines(tmp_path / "o", base=case.base) if one.reads} >= {"PEFT", "vLLM"}


def loaded(case, folder):
    """A model of the class of a case, from another folder."""
    return case.load.func(folder, **case.load.keywords, attn_implementation="eager").eval()


def test_experts_of_the_base_are_no_missing_modules(mixtral):
    verdicts = check_engines(mixtral.folder / "adapter", base=mixtral.base)
    assert {one.engine for one in verdicts if one.reads} >= {"PEFT"}


def test_what_cannot_hold_experts_says_so(mixtral, tmp_path):
    assert "LoRA of experts" in for_profile(mixtral.adapter, "portable").info.ignored[-1]
    without = jcl.load_adapter(mixtral.folder / "adapter")
    assert not without.experts
    assert "the base that it was trained on was not given" in without.info.ignored[-1]
    moved = jcl.transfer(mixtral.adapter, mixtral.base, mixtral.base, "cross-lora", cache=False, effect="never")
    assert any("LoRA of experts" in warning for warning in moved.report.warnings)


def test_one_module_an_expert_is_the_same_as_one_parameter_of_all(mixtral, tmp_path):
    rng, file, config = (
        np.random.default_rng(0),
        {},
        json.loads((mixtral.folder / "adapter/adapter_config.json").read_text()),
    )
    prefix = "base_model.model.model.layers.1.block_sparse_moe.experts.3"
    for part, shape in (("w1", (40, 32)), ("w3", (40, 32)), ("w2", (32, 40))):
        file[f"{prefix}.{part}.lora_A.weight"] = rng.normal(size=(2, shape[1])).astype(np.float32)
        file[f"{prefix}.{part}.lora_B.weight"] = rng.normal(size=(shape[0], 2)).astype(np.float32)
    linear = {key: array for key, array in load_file(mixtral.folder / "adapter/adapter_model.safetensors").items()}
    linear = {key: array for key, array in linear.items() if "experts" not in key}
    (tmp_path / "a").mkdir()
    save_file(file | linear, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    plain = config | {"target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(plain))
    found = jcl.load_adapter(tmp_path / "a", mixtral.base).experts
    assert [update.name for update in found] == [
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    down, gate_up = (update.b[3] @ update.a[3] for update in found)
    each = [
        file[f"{prefix}.{part}.lora_B.weight"] @ file[f"{prefix}.{part}.lora_A.weight"] for part in ("w1", "w3", "w2")
    ]
    np.testing.assert_allclose(gate_up, 1.5 * np.concatenate(each[:2]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(down, 1.5 * each[2], rtol=1e-5, atol=1e-5)
    assert not found[0].b[2].any()


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_a_module_of_one_expert_changes_its_rows_of_the_class(name, tmp_path):
    """Rows of gate and up take turns in gpt_oss, whose class stores the transposes."""
    made, rng = random_model(*EXPERT_VARIANTS[name]), np.random.default_rng(0)
    made.save_pretrained(tmp_path / "base")
    made.set_attn_implementation("eager")
    plain, experts, file = run_torch(made), made.model.layers[1].mlp.experts, {}
    rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    rows = rows if name == "gpt_oss" else {"gate_proj": slice(0, 40), "up_proj": slice(40, 80)}
    with torch.no_grad():
        for part, shape in (("gate_proj", (40, 32)), ("up_proj", (40, 32)), ("down_proj", (32, 40))):
            a, b = rng.normal(size=(2, shape[1])), rng.normal(size=(shape[0], 2))
            module = f"base_model.model.model.layers.1.mlp.experts.3.{part}"
            file |= {f"{module}.lora_A.weight": a.astype(np.float32), f"{module}.lora_B.weight": b.astype(np.float32)}
            whole = experts.down_proj[3] if part == "down_proj" else experts.gate_up_proj[3]
            whole = whole.T if name == "gpt_oss" else whole
            whole[rows.get(part, slice(None))] += torch.from_numpy(1.5 * b @ a).float()
    save_file(file, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = jcl.open_base(tmp_path / "base")
    adapter, wanted = jcl.load_adapter(tmp_path, base), run_torch(made)
    np.testing.assert_allclose(run_ours(base, adapter), wanted, **CLOSE)
    assert np.abs(wanted - plain).max() > 0.05


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same of experts alone."""
    return make("mixtral", tmp_path_factory.mktemp("alone"), targets=())


def with_experts(model, places, layers):
    """Take these experts of these layers."""
    layers = {str(old): new for new, old in enumerate(layers)}
    state = {}
    for name, x in model.state_dict().items():
        part = name.split(".")
        if part[1] == "layers":
            if part[2] not in layers:
                continue
            name = ".".join([*part[:2], str(layers[part[2]]), *part[3:]])
            x = x[places] if "experts" in name or name.endswith("gate.weight") else x
        state[name] = x
    config = model.config.to_dict() | {"num_local_experts": len(places), "num_hidden_layers": len(layers)}
    return jcl.open_base({name: x.numpy() for name, x in state.items()}, config=config)


def test_an_adapter_of_experts_alone_moves_to_a_copy_of_its_base(alone, tmp_path):
    assert not alone.adapter.modules
    moved = jcl.transfer(alone.adapter, alone.base, alone.base, cache=False, effect="never")
    assert moved.report.recipe.method == "copy"
    assert "one and the same base" in moved.verdict.text
    assert any(warning.startswith("moved too: LoRA of experts") for warning in moved.report.warnings)
    np.testing.assert_allclose(run_ours(alone.base, moved.adapter), alone.wanted, **CLOSE)
    out = moved.save(tmp_path / "out", profile="peft")
    loaded = peft.PeftModel.from_pretrained(alone.load(attn_implementation="eager"), str(out)).eval()
    np.testing.assert_allclose(run_torch(loaded), alone.wanted, **CLOSE)


def test_a_rank_for_linear_layers_leaves_an_adapter_of_experts_alone_as_it_is(alone):
    moved = jcl.transfer(alone.adapter, alone.base, alone.base, "copy", out_rank=2, cache=False, effect="never")
    np.testing.assert_allclose(run_ours(alone.base, moved.adapter), alone.wanted, **CLOSE)
    assert (moved.report.truncation, moved.report.out_rank) == (None, 2)


def test_an_adapter_of_experts_goes_with_its_experts_and_layers(mixtral):
    places, model = [4, 2, 0, 1, 3], mixtral.load()
    permuted = with_experts(model, places, [0, 1])
    moved = jcl.transfer(mixtral.adapter, mixtral.base, permuted, "copy", cache=False, effect="never")
    np.testing.assert_allclose(run_ours(permuted, moved.adapter), mixtral.wanted, **CLOSE)
    one = with_experts(model, places, [1])
    moved = jcl.transfer(mixtral.adapter, mixtral.base, one, "select", cache=False, effect="never")
    merged = {update.name: update.b @ update.a for update in mixtral.adapter.experts}
    assert {update.name for update in moved.adapter.experts} == {name for name in merged if ".0." in name}
    for update in moved.adapter.experts:
        wanted = merged[update.name.replace(".0.", ".1.")][places]
        np.testing.assert_allclose(update.b @ update.a, wanted, **CLOSE)
    assert any(text.startswith("not moved: LoRA of experts, model.layers.0.") for text in moved.report.warnings)


def test_what_does_not_move_experts_alone_says_so(alone, tmp_path):
    with pytest.raises(AdapterError, match=r"no update of a linear layer.*LoRA of experts.*use method distill"):
        jcl.transfer(alone.adapter, alone.base, alone.base, "cross-lora", cache=False)
    settings = jcl.TransferSettings(
        *(str(alone.folder / "adapter"), str(alone.folder / "base"), str(alone.folder / "base"), str(tmp_path / "out"))
    )
    with pytest.raises(AdapterError, match=r"no update of a linear layer.*LoRA of experts.*profile peft does"):
        jcl.transfer_files(settings)
    with pytest.raises(OutputError, match=r"LoRA of experts.*profile peft does.*nothing was written"):
        jcl.save_adapter(alone.adapter, tmp_path / "out", base=alone.base)
    assert not (tmp_path / "out").exists()
