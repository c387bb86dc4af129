"""A LoRA extracted from a full fine-tune: numpy's SVD, and peft's logits on the base, are the oracles."""

import json
import re

import numpy as np
import pytest
import safetensors
from command_line import main
from dense_models import random_model
from expert_models import EXPERT_VARIANTS
from full_set import full_except
from recording import recorded
from relatives import make, merged, noisy, scaled, then
from safetensors.numpy import load_file
from tiny_bases import delta
from tiny_models import FAMILIES, save_tiny, tiny_model, torch

import jcrosslora as jcl
from jcrosslora import ExtractSettings, extract
from jcrosslora.checkpoint import weight_stacks
from jcrosslora.errors import AdapterError, CheckpointError, UsageError

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
RANK = 3
TOKENS = torch.tensor([[5, 9, 30, 7, 61, 44, 12]])
ALL_BUT_K = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make("llama").write(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The base with a LoRA of rank 3 merged into all modules but k."""
    change = merged(RANK, 0.4, roles=ALL_BUT_K)
    return then(change)(make("llama")).write(tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The base with every matrix changed, at full rank; the embedding too."""
    return then(noisy(0.3))(make("llama")).write(tmp_path_factory.mktemp("trained") / "trained")


def difference(finetune, base, name):
    return finetune.stored_weight(name).astype(np.float64) - base.stored_weight(name).astype(np.float64)


def spectra(finetune, base):
    return {name: np.linalg.svd(difference(finetune, base, name), compute_uv=False) for name in base.modules}


def run(finetune, base, out, *flags):
    main(["extract", str(finetune.path), "--base", str(base.path), "--out", str(out), *flags])


def test_a_planted_update_is_recovered_at_its_own_rank(planted, base):
    adapter = extract(planted, base)
    assert {name.rpartition(".")[2] for name in adapter.modules} == set(ALL_BUT_K)
    assert list(adapter.modules) == [name for name in base.modules if name in adapter.modules]
    for name, factors in adapter.modules.items():
        assert factors.rank == RANK
        wanted = difference(planted, base, name)
        assert np.linalg.norm(delta(factors) - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert adapter.info.lost == 0
    assert adapter.info.ignored == ()


def test_a_rank_gives_the_nearest_update_of_that_rank(trained, base):
    adapter = extract(str(trained.path), str(base.path), ExtractSettings(rank=5))
    for name, s in spectra(trained, base).items():
        assert adapter.modules[name].rank == 5
        rest = np.linalg.norm(delta(adapter.modules[name]) - difference(trained, base, name))
        np.testing.assert_allclose(rest, np.sqrt(np.sum(s[5:] ** 2)), rtol=1e-4)


@pytest.mark.parametrize(("share", "most"), [(0.5, None), (0.9, None), (0.9, 12), (0.99, None)])
def test_an_energy_gives_the_lowest_ranks_that_hold_it(trained, base, share, most):
    adapter = extract(trained, base, ExtractSettings(energy=share, max_rank=most))
    ranks = {name: factors.rank for name, factors in adapter.modules.items()}
    for name, s in spectra(trained, base).items():
        held = np.cumsum(s**2) / np.sum(s**2)
        wanted = int(np.argmax(held >= share)) + 1
        assert ranks[name] == min(wanted, most or wanted), name
    assert most is not None or len(set(ranks.values())) > 2


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_a_budget_is_kept_to_the_byte_and_spent_where_it_holds_most(trained, base, tmp_path, dtype, width, monkeypatch):
    monkeypatch.setattr(weight_stacks, "GROUP_BYTES", 1)  # what is dropped early would not have fitted later
    budget = 60_000
    run(trained, base, tmp_path / "out", "--budget", "60KB", "--dtype", dtype)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    used = sum(tensor.nbytes for tensor in tensors.values())
    costs = {name: width * sum(module.shape) for name, module in base.modules.items()}
    every = sorted(
        ((s**2 / costs[name], name) for name, found in spectra(trained, base).items() for s in found), reverse=True
    )
    ranks, spent = dict.fromkeys(base.modules, 0), 0
    for _, name in every:
        if spent + costs[name] > budget:
            break
        ranks[name] += 1
        spent += costs[name]
    assert used == spent <= budget < spent + max(costs.values())
    written = jcl.load_adapter(tmp_path / "out")
    assert {name: factors.rank for name, factors in written.modules.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert len(set(ranks.values())) > 2


def finetuned(family, linear_alone):
    """A tiny model with random updates of rank 3; and with other norms, biases and embeddings."""
    model = tiny_model(family, num_hidden_layers=2)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("proj.weight"):
                value.add_(0.1 * torch.randn(value.shape[0], RANK) @ torch.randn(RANK, value.shape[1]))
            elif not linear_alone:
                value.add_(0.1 * torch.randn_like(value))
    return model


@pytest.mark.parametrize("linear_alone", [True, False])
@pytest.mark.parametrize("family", full_except(FAMILIES, {"qwen2", "phi3"}))
def test_base_and_adapter_predict_in_peft_what_the_fine_tune_predicts(tmp_path, family, linear_alone):
    base = jcl.open_base(save_tiny(family, tmp_path / "base", num_hidden_layers=2))
    model = finetuned(family, linear_alone)
    model.save_pretrained(tmp_path / "tuned")
    tuned = jcl.open_base(tmp_path / "tuned")
    run(tuned, base, tmp_path / "out", *([] if linear_alone else ["--keep", "norms", "biases", "embeddings"]))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, RANK)
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(tiny_model(family, num_hidden_layers=2), tmp_path / "out")
        wanted, plain = model(TOKENS).logits, tiny_model(family, num_hidden_layers=2)(TOKENS).logits
        torch.testing.assert_close(adapted(TOKENS).logits, wanted, atol=1e-3, rtol=1e-4)
    assert (wanted - plain).abs().max() > 0.1


def test_what_is_left_out_is_said_with_its_share(tmp_path, capsys):
    base = jcl.open_base(save_tiny("qwen2", tmp_path / "base", num_hidden_layers=2))
    finetuned("qwen2", linear_alone=False).save_pretrained(tmp_path / "tuned")
    tuned = jcl.open_base(tmp_path / "tuned")
    sizes = {"modules": 0.0, "embeddings": 0.0, "norms": 0.0, "biases": 0.0}
    for name in base.tensor_shapes():
        kind = "embeddings" if "embed" in name else "norms" if "norm" in name else "modules"
        kind = "biases" if name.endswith("bias") else kind
        sizes[kind] += float(np.sum((tuned.tensor(name).astype(np.float64) - base.tensor(name)) ** 2))
    run(tuned, base, tmp_path / "json", "--json", "--rank", "2")
    found = json.loads(capsys.readouterr().out)
    shares = {kind: size / sum(sizes.values()) for kind, size in sizes.items()}
    assert found["shares"] == pytest.approx(shares, rel=1e-5)
    assert set(found["left_out"]) == {"embeddings", "norms", "biases"}
    for row in found["kinds"]:
        assert row["ranks"] == [2, 2]
        assert row["error"] ** 2 + row["kept"] == pytest.approx(1)
    s = np.array([spectrum**2 for name, spectrum in spectra(tuned, base).items() if name.endswith("q_proj")])
    assert found["kinds"][0]["kind"] == "q_proj"
    assert found["kinds"][0]["kept"] == pytest.approx(s[:, :2].sum() / s.sum(), rel=1e-5)
    run(tuned, base, tmp_path / "out", "--keep", "norms")
    said = capsys.readouterr().out
    for kind in ("embeddings", "biases"):
        assert f"{kind} ({shares[kind]:.1%} of the whole difference)" in said
    assert re.search("left out: .*; --keep (embeddings biases|biases embeddings) keeps them whole", said)


def test_experts_are_left_out_with_their_share(tmp_path):
    models = [random_model(*EXPERT_VARIANTS["qwen3_moe"]) for _ in range(2)]
    with torch.no_grad():
        for name, value in models[1].named_parameters():
            if "experts" in name or name.endswith("q_proj.weight"):
                value.add_(0.1)
    (base, tuned) = (jcl.open_base(model) for model in models)
    adapter = extract(tuned, base)
    assert {name.rpartition(".")[2] for name in adapter.modules} == {"q_proj"}
    counts = [sum(v.numel() for k, v in models[0].named_parameters() if part in k) for part in ("experts", "q_proj.w")]
    share = f"{counts[0] / sum(counts):.1%}"
    assert adapter.info.ignored == (f"experts of {adapter.info.name} ({share} of its difference).",)


def test_rows_that_a_vocabulary_gained_are_not_compared(tmp_path, base, capsys):
    made = then(merged(RANK, 0.4))(make("llama"))
    longer = made.tensors["model.embed_tokens.weight"][:5]
    made = made.change(
        lambda name, x: np.concatenate([x, longer]) if name == "model.embed_tokens.weight" else x, vocab_size=133
    )
    tuned = made.write(tmp_path / "tuned")
    run(tuned, base, tmp_path / "out", "--keep", "embeddings")
    said = capsys.readouterr().out
    assert "the fine-tune has 133 tokens, the base 128: the first 128 rows are compared" in said
    assert "left out" not in said
    assert not jcl.load_adapter(tmp_path / "out", base).tokens


def test_a_quantised_base_is_dequantised_and_its_rounding_is_named(tmp_path, capsys):
    made = make("llama")
    quantised = made.write_gguf(tmp_path / "base.gguf", "Q8_0")
    tuned = then(merged(RANK, 0.4))(made.quantised("Q8_0")).write(tmp_path / "tuned")
    run(tuned, quantised, tmp_path / "out")
    assert "note: the fine-tune is stored as F32, the base as Q8_0" in capsys.readouterr().out
    written = jcl.load_adapter(tmp_path / "out")
    for name, factors in written.modules.items():
        wanted = difference(tuned, quantised, name)
        assert np.linalg.norm(delta(factors) - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_one_group_of_modules_is_read_after_the_other(trained, base, monkeypatch):
    monkeypatch.setattr(weight_stacks, "GROUP_BYTES", 1)
    read: list[str] = []
    models = []
    for each in (trained, base):
        model, store = recorded(each)
        store.read = read
        models.append(model)
    extract(*models)
    weights = [name for name in read if "_proj" in name]
    # At most as many modules of each as there are devices, before those of the other.
    assert len(weights) == 2 * len(base.modules)
    for first in range(0, len(weights), 4):
        assert weights[first : first + 2] == weights[first + 2 : first + 4]


def test_the_header_names_both_models_and_a_transfer_has_no_warnings(planted, base, tmp_path):
    run(planted, base, tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out" / "adapter_model.safetensors", "np") as file:
        header = file.metadata()
    made, target = json.loads(header["jcrosslora.extract"]), json.loads(header["jcrosslora.target"])
    assert [made[role]["digest"] for role in ("finetune", "base")] == [planted.digest(), base.digest()]
    assert (made["finetune"]["name"], made["rule"]) == ("planted", "rank 16")
    assert target["digest"] == base.digest()
    for adapter in (tmp_path / "out", extract(planted, base)):
        moved = jcl.transfer(adapter, base, planted, "copy", cache=False)
        assert moved.report.warnings == ()
        for name, factors in moved.adapter.modules.items():
            np.testing.assert_allclose(delta(factors), difference(planted, base, name), atol=1e-5)


def test_what_a_rank_loses_and_leaves_out_is_told_by_the_transfer(trained, base):
    adapter = extract(trained, base, ExtractSettings(rank=2))
    moved = jcl.transfer(adapter, base, base, "copy", cache=False)
    assert any("cut" not in one and "at rank 2, which keeps" in one for one in moved.report.warnings)
    assert any(one.startswith("not moved: embeddings of trained (") for one in moved.report.warnings)


@pytest.mark.parametrize(
    ("other", "error", "said"),
    [
        (
            {"hidden_size": 96},
            CheckpointError,
            r"is no fine-tune of .*norm.weight is 96 in it, and 64 in the base: give",
        ),
        ({"num_hidden_layers": 5}, CheckpointError, r"model.layers.4.* is 64 in it, and missing in the base"),
        ({}, AdapterError, "there is no update to extract from .*: they have the same weights in all linear modules"),
    ],
)
def test_models_without_a_difference_to_extract_are_refused(base, tmp_path, capsys, other, error, said):
    tuned = make("llama", **other).write(tmp_path / "tuned")
    with pytest.raises(error, match=said):
        extract(tuned, base)
    with pytest.raises(SystemExit) as left:
        run(tuned, base, tmp_path / "made" / "out")
    assert left.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 4, "energy": 0.5}, "rank and energy were given, expected one of them"),
        ({"rank": 0}, "rank 0: expected 1 or more"),
        ({"energy": 1.5}, "energy 1.5: expected a share"),
        ({"energy": float("nan")}, "energy nan: expected a share"),
        ({"budget": "many"}, "budget 'many': expected a number of bytes"),
        ({"budget": "0"}, "budget '0': expected a number of bytes"),
        ({"rank": 4, "max_rank": 8}, "max_rank 8: expected 1 or more, not with rank"),
        ({"keep": ("heads",)}, "keep is .*; expected a list of 'norms', 'biases', 'embeddings'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        ExtractSettings(**settings)


def test_a_budget_below_one_rank_is_refused(planted, base):
    with pytest.raises(AdapterError, match="not one rank fits 10B of factors"):
        extract(planted, base, ExtractSettings(budget="10B"))


def test_nothing_is_left_of_an_interrupted_extraction(planted, base, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.write_bytes", interrupted)
    (tmp_path / "made").mkdir()
    with pytest.raises(SystemExit) as left:
        run(planted, base, tmp_path / "made" / "out")
    assert left.value.code == 130
    assert "nothing was written" in capsys.readouterr().err
    assert list((tmp_path / "made").iterdir()) == []


def test_weights_that_are_not_finite_are_refused(base, tmp_path):
    broken = scaled(np.inf)(make("llama")).write(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        extract(broken, base)
