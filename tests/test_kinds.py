"""One contract for every kind of adapter: our factors give the weights that peft merges from the same file."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from adapter_folders import CONFIG, Q, V, adapter_of, delta, matrix, tensors, write_folder
from full_set import first_of_each
from kind_cases import FULL, LORA, MADE, lora, make_adapter, peft
from tiny_models import tiny_model, torch

from jcrosslora.adapter import LoRAFactors, add_adapters, load_adapter, update_norm
from jcrosslora.adapter.kinds import KINDS
from jcrosslora.adapter.kinds.dora import full_update
from jcrosslora.checkpoint import open_base
from jcrosslora.errors import AdapterError, UsageError

# peft warns of many settings that are intended here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]

CASES = [
    pytest.param(kind, make, id=f"{kind} {label}") for kind, cases in MADE.items() for label, make in cases.items()
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


def merged_weights(folder):
    """Return the merged weights of an adapter loaded by peft, and the weights of the base alone."""
    model = tiny_model("llama")
    base = {name: value.clone().numpy() for name, value in model.state_dict().items()}
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    return wrapped.merge_and_unload().state_dict(), base


def check_against(modules, merged, base, atol=1e-4):
    changed = {name.removesuffix(".weight") for name in base if not np.array_equal(base[name], merged[name])}
    assert changed - {"lm_head", "model.embed_tokens"} == set(modules)
    for name, factors in modules.items():
        got = base[f"{name}.weight"].astype(np.float64) + delta(factors)
        np.testing.assert_allclose(got, merged[f"{name}.weight"], rtol=0, atol=atol)


@pytest.mark.parametrize(("kind", "make"), first_of_each(CASES, lambda case: case.values[0]))
def test_factors_are_the_update_that_peft_makes_of_the_file(tmp_path, base_folder, kind, make):
    make_adapter(make(), tmp_path)
    adapter = load_adapter(tmp_path, open_base(base_folder), rank=FULL)
    assert adapter.info.kind == kind
    if kind == "LoRA":
        assert adapter.info.read_as is None
    else:
        assert adapter.info.read_as is not None
        assert "exactly" in adapter.info.read_as
        assert adapter.info.read_as.startswith(f"{kind} (")
    if kind == "aLoRA":  # peft does not merge it, but a plain LoRA has the same weights
        config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"alora_invocation_tokens": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert adapter.info.invocation == (5, 7)
    merged, base = merged_weights(tmp_path)
    check_against(adapter.modules, {name: value.numpy() for name, value in merged.items()}, base)


@pytest.mark.parametrize("alpha", [None, 0, -2])
def test_the_scale_of_adalora_is_the_one_that_peft_takes(tmp_path, base_folder, alpha):
    """A missing lora_alpha, None here, means the default; zero or less means the rank."""
    make_adapter(MADE["AdaLoRA"]["pruned"](), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"lora_alpha": alpha}
    if alpha is None:
        del config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = load_adapter(tmp_path, open_base(base_folder))
    merged, base = merged_weights(tmp_path)
    check_against(adapter.modules, {name: value.numpy() for name, value in merged.items()}, base)


# Kinds that peft lacks: their tensor beside lora_A and lora_B, its value, and the matrix between B and A.
def softmax(values):
    powers = np.exp(values - values.max())
    return powers / powers.sum()


GATE = 0.05 * matrix(1, 2, seed=7)
BY_HAND = {
    "LoRA-XS": ("_lora_latent_mapping.weight", matrix(2, 2, seed=7), matrix(2, 2, seed=7).astype(np.float64)),
    "BeamLoRA": (".lora_gate", GATE, np.diag(2 * softmax(GATE[0].astype(np.float64) / 0.05))),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_kinds_of_other_repositories_follow_their_formula(tmp_path, kind):
    ending, value, between = BY_HAND[kind]
    weights = tensors()
    config = CONFIG | {"use_beamlora": True} if kind == "BeamLoRA" else CONFIG
    folder = write_folder(tmp_path, config, weights | {f"base_model.model.{name}{ending}": value for name in (Q, V)})
    adapter = load_adapter(folder)
    assert adapter.info.kind == kind
    assert list(adapter.modules) == [Q, V]
    assert adapter.info.ignored == ()
    for name in (Q, V):
        a, b = (weights[f"base_model.model.{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        np.testing.assert_allclose(delta(adapter.modules[name]), 2 * b @ between @ a, rtol=0, atol=1e-6)


def test_a_sum_is_of_adapters_of_one_base_that_always_act():
    adapter = adapter_of({Q: 2})
    bound = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation=(5,)))
    with pytest.raises(AdapterError, match="acts only after"):
        add_adapters([bound, adapter])
    with pytest.raises(AdapterError, match="adapters of one base"):
        add_adapters([adapter, adapter_of({Q: 2}, width=7)])


def test_every_kind_has_a_case():
    assert {kind.name for kind in KINDS} == MADE.keys() | BY_HAND.keys()


@pytest.fixture(scope="module")
def dora(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dora")
    make_adapter(lora(use_dora=True, target_modules=["down_proj"]), folder)
    return folder


@pytest.mark.parametrize("rank", [None, 3])
def test_a_dora_is_read_as_its_best_fit_with_the_loss_reported(base_folder, dora, rank):
    base = open_base(base_folder)
    adapter, whole = load_adapter(dora, base, rank=rank), load_adapter(dora, base, rank=FULL)
    lost = total = 0.0
    for name, factors in adapter.modules.items():
        assert factors.rank == (2 * LORA["r"] if rank is None else rank)
        u, s, vt = np.linalg.svd(delta(whole.modules[name]))
        best = (u[:, : factors.rank] * s[: factors.rank]) @ vt[: factors.rank]
        np.testing.assert_allclose(delta(factors), best, rtol=0, atol=1e-5)
        lost, total = lost + np.sum(s[factors.rank :] ** 2), total + np.sum(s**2)
    assert f"which loses {lost / total:.1%} of the update's energy" in (adapter.info.read_as or "")
    assert adapter.info.rank_limit == rank


def random_factors(rank):
    return LoRAFactors(a=matrix(rank, 5, seed=1), b=matrix(6, rank, seed=2), scale=0.5)


def test_a_dora_whose_magnitudes_are_the_norms_is_its_lora():
    weight, factors = matrix(6, 5, seed=3), random_factors(rank=2)
    norms = np.linalg.norm(weight + delta(factors), axis=1).astype(np.float32)
    np.testing.assert_allclose(full_update(weight, factors, norms), delta(factors), rtol=0, atol=1e-6)
    weight[2], factors.b[2] = 0, 0
    assert np.isfinite(full_update(weight, factors, norms)).all()


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoRA"])
def test_a_lower_rank_is_the_best_fit_with_the_loss_reported(tmp_path, base_folder, kind):
    make_adapter(next(iter(MADE[kind].values()))(), tmp_path)
    whole, cut = load_adapter(tmp_path), load_adapter(tmp_path, rank=2)
    lost = total = 0.0
    for name, factors in cut.modules.items():
        assert factors.rank == 2
        u, s, vt = np.linalg.svd(delta(whole.modules[name]))
        np.testing.assert_allclose(delta(factors), (u[:, :2] * s[:2]) @ vt[:2], rtol=0, atol=1e-5)
        lost, total = lost + np.sum(s[2:] ** 2), total + np.sum(s**2)
    assert f"read at rank 2, which loses {lost / total:.1%}" in (cut.info.read_as or "")


def test_zero_directions_are_removed_from_the_rank(tmp_path):
    """Equal pairs of a LoHa give equal directions: its 9 products have rank 6."""
    make_adapter(peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = safetensors.numpy.load_file(path)
    for key in list(weights):
        if "hada_w2" in key:
            weights[key] = weights[key.replace("hada_w2", "hada_w1")]
    safetensors.numpy.save_file(weights, path)
    assert {factors.rank for factors in load_adapter(tmp_path).modules.values()} == {6}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("DoRA", "rescales the rows"),
        ("PiSSA", "starts from factors"),
        ("VeRA", "slices"),
        ("Uni-LoRA", "without its indices"),
    ],
)
def test_a_missing_base_is_asked_for_with_the_reason(tmp_path, kind, said):
    make_adapter(next(iter(MADE[kind].values()))(), tmp_path)
    with pytest.raises(AdapterError, match=f"{kind} .*{said}.*the source base is needed"):
        load_adapter(tmp_path)


def test_another_base_is_refused(tmp_path, dora):
    tiny_model("llama", hidden_size=32, intermediate_size=80).save_pretrained(tmp_path / "narrow")
    with pytest.raises(AdapterError, match=r"is 48 x 80, in the base .* it is 32 x 80"):
        load_adapter(dora, open_base(tmp_path / "narrow"))
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    with pytest.raises(AdapterError, match=r"layers\.1\..*is not one of the base"):
        load_adapter(dora, open_base(tmp_path / "short"))


def test_a_rank_below_one_is_refused(dora):
    with pytest.raises(UsageError, match="adapter rank 0"):
        load_adapter(dora, rank=0)


def test_fused_modules_are_read_with_their_fused_weights(tmp_path):
    tiny_model("phi3").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**LORA, target_modules=["qkv_proj", "o_proj"], init_lora_weights="pissa")
    wrapped = peft.get_peft_model(tiny_model("phi3"), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", open_base(tmp_path / "base"))
    # As initialised: the update is zero up to rounding of the weights.
    assert max(update_norm(factors) for factors in adapter.modules.values()) < 1e-4 * np.linalg.norm(
        open_base(tmp_path / "base").weight("model.layers.0.self_attn.q_proj")
    )
    assert "model.layers.0.self_attn.qkv_proj" in adapter.modules
    uni = peft.get_peft_model(tiny_model("phi3"), peft.UniLoraConfig(r=2, target_modules=["qkv_proj"]))
    uni.save_pretrained(tmp_path / "uni")
    with pytest.raises(AdapterError, match="save_indices"):
        load_adapter(tmp_path / "uni", open_base(tmp_path / "base"))


def test_the_energy_of_ignored_changes_is_reported(tmp_path):
    model = tiny_model("qwen2", num_hidden_layers=1, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**LORA, target_modules=["q_proj", "embed_tokens", "lm_head"], bias="lora_only")
    wrapped = peft.get_peft_model(model, config)
    energy = {"bias": 0.0}
    before = {name: value.clone() for name, value in wrapped.named_parameters()}
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    scale = LORA["lora_alpha"] / LORA["r"]
    state = {name: value.detach().numpy().astype(np.float64) for name, value in wrapped.named_parameters()}
    prefix = "base_model.model."
    q, head, words = f"{prefix}model.layers.0.self_attn.q_proj", f"{prefix}lm_head", f"{prefix}model.embed_tokens"

    def product(one, two):
        return np.sum((scale * state[one] @ state[two]) ** 2)

    energy["moved"] = product(f"{q}.lora_B.default.weight", f"{q}.lora_A.default.weight")
    energy["head"] = product(f"{head}.lora_B.default.weight", f"{head}.lora_A.default.weight")
    energy["embedding"] = product(f"{words}.lora_embedding_B.default", f"{words}.lora_embedding_A.default")
    for name, value in state.items():
        if name.endswith("base_layer.bias"):
            energy["bias"] += np.sum((value - before[name].detach().numpy()) ** 2)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    adapter = load_adapter(tmp_path / "adapter", open_base(tmp_path / "base"))
    assert list(adapter.modules) == ["model.layers.0.self_attn.q_proj"]
    total = sum(energy.values())
    assert f"({energy['bias'] / total:.1%} of the whole change's squared norm)" in " ".join(adapter.info.ignored)
    assert {update.kind: update.share for update in adapter.tokens} == {
        sort: pytest.approx(energy[sort] / total, rel=1e-5) for sort in ("embedding", "head")
    }
