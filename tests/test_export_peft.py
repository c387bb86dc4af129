"""Exports loaded by peft on a tiny model of each family: merged weights are W + dW, without warnings of peft."""

import numpy as np
import pytest
from adapter_folders import base_of, delta
from tiny_models import FAMILIES, tiny_model, torch

from jcrosslora.adapter import Adapter, LoRAFactors, load_adapter, save_adapter, split_fused

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EPS = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-10}


def linear_modules(model) -> dict[str, tuple[int, int]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def random_adapter(shapes, ranks, scale=1.7, seed=0) -> Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for place, (name, (rows, width)) in enumerate(shapes.items()):
        rank = ranks[place % len(ranks)]
        a, b = rng.normal(size=(rank, width)), rng.normal(size=(rows, rank))
        # Transposed views, as a transfer may leave them.
        modules[name] = LoRAFactors(a=np.ascontiguousarray(a.T).T, b=np.ascontiguousarray(b.T).T, scale=scale)
    return Adapter(modules)


def merged_by_peft(model, folder) -> dict[str, np.ndarray]:
    wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    return {name: value.numpy() for name, value in wrapped.merge_and_unload().state_dict().items()}


def assert_merged(base, merged, updates, dtype) -> None:
    for name, weight in base.items():
        if name.removesuffix(".weight") not in updates:
            np.testing.assert_array_equal(merged[name], weight)
            continue
        factors = updates[name.removesuffix(".weight")]
        size = abs(factors.scale) * np.abs(factors.b) @ np.abs(factors.a) + np.abs(weight)
        error = np.abs(merged[name] - (weight.astype(np.float64) + delta(factors)))
        assert (error <= 4 * EPS[dtype] * size).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("profile", ["portable", "peft"])
@pytest.mark.parametrize("dtype", list(EPS))
def test_peft_merges_the_written_update(tmp_path, family, profile, dtype):
    model = tiny_model(family, num_hidden_layers=2)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    shapes = linear_modules(model)
    # Every third module has no update, so that exclude_modules is needed.
    chosen = {name: shape for place, (name, shape) in enumerate(shapes.items()) if place % 3}
    adapter = random_adapter(chosen, ranks=(3, 1, 4))
    out = save_adapter(adapter, tmp_path / "o", profile=profile, dtype=dtype, base=base_of(shapes))
    assert_merged(base, merged_by_peft(model, out), adapter.modules, dtype)


@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_layers_1_and_11_are_told_apart(tmp_path, profile):
    model = tiny_model("llama", num_hidden_layers=12)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    shapes = linear_modules(model)
    chosen = {name: shape for name, shape in shapes.items() if name.split(".")[2] in ("1", "11", "10")}
    del chosen["model.layers.1.self_attn.q_proj"], chosen["model.layers.11.mlp.up_proj"]
    adapter = random_adapter(chosen, ranks=(2, 5, 2, 3))
    out = save_adapter(adapter, tmp_path / "o", profile=profile, base=base_of(shapes))
    assert_merged(base, merged_by_peft(model, out), adapter.modules, "float32")


PHI3_PARTS = {
    "self_attn.qkv_proj": (("self_attn.q_proj", 0, 48), ("self_attn.k_proj", 48, 72), ("self_attn.v_proj", 72, 96)),
    "mlp.gate_up_proj": (("mlp.gate_proj", 0, 80), ("mlp.up_proj", 80, 160)),
}
PHI3_FUSED = {
    f"model.layers.{layer}.{name}": tuple((f"model.layers.{layer}.{part}", start, stop) for part, start, stop in parts)
    for layer in range(2)
    for name, parts in PHI3_PARTS.items()
}


@pytest.mark.parametrize("profile", ["portable", "peft"])
def test_updates_of_logical_modules_reach_the_rows_of_phi3(tmp_path, profile):
    model = tiny_model("phi3", num_hidden_layers=2)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    parts = {part: (holder, start, stop) for holder, rows in PHI3_FUSED.items() for part, start, stop in rows}
    del parts["model.layers.1.self_attn.k_proj"]
    adapter = random_adapter({part: (stop - start, 48) for part, (_, start, stop) in parts.items()}, ranks=(2, 3))
    every = [name for name in linear_modules(model) if name not in PHI3_FUSED] + [
        part for rows in PHI3_FUSED.values() for part, _, _ in rows
    ]
    out = save_adapter(adapter, tmp_path / "o", profile=profile, base=base_of(every, fused=PHI3_FUSED))
    merged = merged_by_peft(model, out)
    want = {name: weight.astype(np.float64) for name, weight in base.items()}
    for part, (holder, start, stop) in parts.items():
        want[f"{holder}.weight"][start:stop] += delta(adapter.modules[part])
    for name, weight in want.items():
        np.testing.assert_allclose(merged[name], weight, rtol=1e-5, atol=1e-5)


def test_a_phi3_adapter_is_split_and_written_back(tmp_path):
    model = tiny_model("phi3", num_hidden_layers=2)
    base = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["qkv_proj", "gate_up_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    split = split_fused(adapter, PHI3_FUSED)
    assert len(split.modules) == 10
    out = save_adapter(split, tmp_path / "o", base=base_of([], fused=PHI3_FUSED))
    assert {factors.rank for factors in load_adapter(out).modules.values()} == {3}
    assert_merged(base, merged_by_peft(tiny_model("phi3", num_hidden_layers=2), out), adapter.modules, "float32")
