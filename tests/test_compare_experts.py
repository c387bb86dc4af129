"""Test the comparison of bases with experts, and of hybrid ones, on constructed pairs with a known relation."""

import dataclasses

import numpy as np
import pytest
from relatives import layer_of, make, merged, noisy, then, with_layers

from jcrosslora import compare_bases

COUNT = 6
SPARSE = {"num_experts": COUNT, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
HYBRID = SPARSE | {
    "shared_expert_intermediate_size": 32,
    "layer_types": KINDS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


def sparse(seed=0):
    return make("qwen3_moe", seed=seed, **SPARSE)


def of_experts(name):
    return ".experts." in name


def fused(made):
    """Store the experts of a layer in one tensor each, as transformers does in memory."""
    tensors = {name: x for name, x in made.tensors.items() if not of_experts(name)}
    for layer in range(made.size("num_hidden_layers")):
        experts = f"model.layers.{layer}.mlp.experts."
        each = {
            part: [made.tensors[f"{experts}{expert}.{part}_proj.weight"] for expert in range(made.size("num_experts"))]
            for part in ("gate", "up", "down")
        }
        tensors[f"{experts}gate_up_proj"] = np.concatenate([np.stack(each["gate"]), np.stack(each["up"])], axis=1)
        tensors[f"{experts}down_proj"] = np.stack(each["down"])
    return dataclasses.replace(made, tensors=tensors)


def with_experts(index):
    """Take these experts, in this order."""

    def build(made):
        tensors = {}
        for name, x in made.tensors.items():
            if name.endswith("mlp.gate.weight"):
                tensors[name] = x[index]
            elif not of_experts(name):
                tensors[name] = x
        for new, old in enumerate(index):
            for name in (name for name in made.tensors if f".experts.{old}." in name):
                tensors[name.replace(f".experts.{old}.", f".experts.{new}.")] = made.tensors[name]
        return dataclasses.replace(made, config=made.config | {"num_experts": len(index)}, tensors=tensors)

    return build


def other_experts(made):
    other = sparse(seed=1)
    return made.change(lambda name, x: other.tensors[name] if of_experts(name) else x)


def four_bits(made):
    def change(name, x):
        if not of_experts(name):
            return x
        blocks = x.reshape(-1, 16)
        scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
        return (np.round(blocks / scale) * scale).reshape(x.shape)

    return made.change(change)


def one_number(made):
    def change(name, x):
        x = x.copy()
        if name == "model.layers.1.mlp.experts.0.up_proj.weight":
            x[0, 5] += 1e-3
        return x

    return made.change(change)


# name: (change of the base, expected words, the start of the method that `auto` takes)
CASES = {
    "a copy": (lambda made: made, ("same",), "copy"),
    "a copy, fused": (fused, ("same",), "copy"),
    "experts trained": (noisy(0.05, only=of_experts), ("further trained",), "interpolated-copy"),
    "experts trained, fused": (then(noisy(0.05, only=of_experts), fused), ("further trained",), "interpolated-copy"),
    "all trained": (noisy(0.05), ("further trained",), "interpolated-copy"),
    "routers trained": (noisy(0.05, only=lambda name: ".mlp.gate." in name), ("further trained",), "copy"),
    "one number of an expert": (one_number, ("further trained",), "copy"),
    "merged into experts": (merged(2, 0.02, roles=("gate_proj", "down_proj")), ("LoRA-merged",), "interpolated-copy"),
    "fewer layers": (with_layers([0, 2, 3]), ("pruned",), "select"),
    "fewer layers, trained": (then(with_layers([1, 3]), noisy(0.03)), ("pruned", "further trained"), "select"),
    "repeated layers": (with_layers([0, 1, 2, 1, 2, 3]), ("upscaled",), "select"),
    "fewer experts": (with_experts([0, 2, 3, 5]), ("pruned",), "copy"),
    "experts permuted": (with_experts([3, 1, 0, 5, 4, 2]), ("permuted",), "copy"),
    "other experts": (other_experts, ("pruned", "extended"), "cross-lora"),
    "experts of four bits": (four_bits, ("quantised",), "copy"),
    "other seed": (lambda _: sparse(seed=1), ("unrelated",), "cross-lora"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sparse().write(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("name", CASES)
def test_constructed_relation_of_experts_is_recognised(source, tmp_path, name):
    change, words, method = CASES[name]
    found = compare_bases(source, change(sparse()).write(tmp_path))
    assert found.words == words, found.sentence
    # The bases have no tokenizers, without which nothing is fitted.
    assert found.choice.method == method, found.choice.reason
    if name == "fewer experts":
        assert "4 of 6 experts" in found.sentence
        assert "the target lacks experts of the source" in found.choice.reason
    if name == "experts of four bits":
        assert "the target is rounded coarsely" in found.choice.reason
        assert "of the sampled experts" in found.choice.reason
    if name == "other experts":
        assert "experts of 4 layers have no counterpart" in found.choice.reason


@pytest.mark.parametrize(
    ("layers", "word"), [([0, 1, 2, 3], "same"), ([0, 1, 3], "pruned"), ([1, 0, 3, 2], "permuted")]
)
def test_layers_of_hybrids_with_experts_are_found(tmp_path, layers, word):
    made = make("qwen3_next", **HYBRID)
    target = with_layers(layers)(made)
    target = dataclasses.replace(target, config=target.config | {"layer_types": [KINDS[layer] for layer in layers]})
    found = compare_bases(made.write(tmp_path / "s"), target.write(tmp_path / "t"))
    assert (found.words, found.layers) == ((word,), tuple(layers)), found.sentence


def test_state_of_a_mixer_that_was_trained_is_seen(tmp_path):
    made = make("qwen3_next", **HYBRID)
    target = made.change(lambda name, x: 1.1 * x if name.endswith("A_log") and layer_of(name) == 2 else x)
    found = compare_bases(made.write(tmp_path / "s"), target.write(tmp_path / "t"))
    assert [item.role for item in found.compared if item.difference.change != "equal"] == ["mixer tensors"]
