"""Test the transfer to bases made of the source's parts: it equals the same change of the adapted source."""

import dataclasses

import numpy as np
import pytest
from command_line import main
from recording import recorded
from relatives import (
    make,
    noisy,
    shuffled,
    subset,
    then,
    with_heads,
    with_layers,
    with_neurons,
    with_stream,
)
from tiny_bases import delta, random_adapter

import jcrosslora as jcl
from jcrosslora.relation import choose_method, find_structure


def mixed_heads(layer, groups, served):
    return [group * served + shuffled(served, 31 + layer) for group in shuffled(groups, 41 + layer)]


def kept_heads(layer, groups, served):
    return [[group * served + layer % served] for group in range(groups)]


fewer_neurons = with_neurons(lambda layer, count: subset(count, 60 + layer, count // 2))
reordered = then(
    with_neurons(lambda layer, count: shuffled(count, 20 + layer)),
    with_heads(mixed_heads, lambda layer, size: shuffled(size, 70 + layer)),
    with_stream(shuffled(64, 5)),
)
# name: (family, change of the base)
CASES = {
    "fewer layers": ("llama", with_layers([0, 2, 3])),
    "fewer neurons": ("gemma3_text", fewer_neurons),
    "fewer heads": ("qwen2", with_heads(kept_heads)),
    "narrower": ("llama", with_stream(subset(64, 3, 48))),
    "permuted": ("llama", reordered),
    "permuted, fused": ("phi3", with_stream(shuffled(64, 5))),
    "repeated layers": ("mistral", with_layers([0, 1, 2, 1, 2, 3])),
    "all at once": (
        "llama",
        then(
            with_layers([0, 1, 1, 3]), reordered, fewer_neurons, with_heads(kept_heads), with_stream(subset(64, 9, 60))
        ),
    ),
}


def adapted(made, adapter):
    """Merge an adapter into a base."""
    tensors = dict(made.tensors)
    for name, factors in adapter.modules.items():
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"] + delta(factors)).astype(np.float32)
    return dataclasses.replace(made, tensors=tensors)


@pytest.mark.parametrize("name", CASES)
def test_rows_and_columns_of_every_module_are_found(tmp_path, name):
    family, change = CASES[name]
    made = make(family)
    source, target = made.write(tmp_path / "source"), change(made).write(tmp_path / "target")
    choice = choose_method(source, target)
    assert choice.method == "select", choice.reason
    assert "cosine 1.000" in choice.reason
    structure, _ = find_structure(source, target)
    for module in target.modules.values():
        rows, columns = structure.outputs(module.layer, module.role), structure.inputs(module.layer, module.role)
        whole = source.weight(structure.counterpart(module))
        np.testing.assert_array_equal(target.weight(module.name), whole[rows][:, columns])


def test_moved_update_equals_the_selection_of_the_adapted_source(tmp_path):
    family, change = CASES["all at once"]
    made = make(family)
    source, target = made.write(tmp_path / "source"), change(made).write(tmp_path / "target")
    adapter = random_adapter(source, seed=3, roles=("v_proj", "down_proj"))
    moved = jcl.shift(jcl.align(source, target, method="select", sources=adapter.modules), adapter)
    assert len(moved.adapter.modules) == 2 * len(moved.report.layers)
    verdict = jcl.verdict(moved.report)
    assert (verdict.level, "the same parts" in verdict.text) == ("aligned", True)
    for row in moved.report.rows:
        sizes = source.modules[row.source].shape, target.modules[row.target].shape
        assert row.part_cosine == pytest.approx(1, abs=1e-5)
        assert (row.weight_cosine is None) == (len(set(sizes)) == 2)
    want, base = change(adapted(made, adapter)), change(made)
    for module, factors in moved.adapter.modules.items():
        key = f"{module}.weight"
        np.testing.assert_allclose(delta(factors), want.tensors[key] - base.tensors[key], atol=1e-4)


def test_transfer_from_a_pruned_base_to_the_full_base(tmp_path):
    """The moved update is zero in parts that the pruned base lacks."""
    made = make()
    whole, small = made.write(tmp_path / "whole"), fewer_neurons(made).write(tmp_path / "small")
    assert choose_method(small, whole).method == "select"
    adapter = random_adapter(small, seed=4, roles=("up_proj",))
    moved = jcl.shift(jcl.align(small, whole, method="select", sources=adapter.modules), adapter)
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.up_proj"
        want = np.zeros((96, 64))
        want[subset(96, 60 + layer, 48)] = delta(adapter.modules[name])
        np.testing.assert_allclose(delta(moved.adapter.modules[name]), want, atol=1e-5)


def test_auto_selects_the_method_and_equals_the_explicit_choice(tmp_path, capsys):
    made = make()
    source = made.write(tmp_path / "source")
    then(with_layers([0, 2, 3]), noisy(0.02))(made).write(tmp_path / "target")
    jcl.save_adapter(random_adapter(source, roles=("q_proj",)), tmp_path / "adapter", base_name="some/base")
    given = ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target"), "--no-cache"]
    main(["transfer", str(tmp_path / "adapter"), *given, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "method: select, because one of the two bases is made of the other's parts" in printed
    assert "not moved: 1 source modules feed no target module (layers 1)" in printed
    again = ["--method", "select", "--depth", "0,2,3", "--out", str(tmp_path / "again")]
    main(["transfer", str(tmp_path / "adapter"), *given, *again])
    first, second = (jcl.load_adapter(tmp_path / name) for name in ("out", "again"))
    for name, factors in first.modules.items():
        np.testing.assert_array_equal(delta(factors), delta(second.modules[name]))


def test_unrelated_bases_and_other_depth_maps_are_refused(tmp_path):
    made = make()
    source, (target, store) = made.write(tmp_path / "source"), recorded(reordered(made).write(tmp_path / "target"))
    find_structure(source, target)
    once = store.read.count("model.embed_tokens.weight")
    store.read.clear()
    moved = jcl.transfer(random_adapter(source, roles=("q_proj",)), source, target, cache=False)
    assert moved.report.recipe.method == "select"
    assert store.read.count("model.embed_tokens.weight") == once > 0


def test_bases_that_do_not_consist_of_parts_are_refused(tmp_path):
    source, target = make().write(tmp_path / "source"), make(seed=1).write(tmp_path / "target")
    with pytest.raises(jcl.MethodError, match="made of the other's parts: neither their embeddings nor any"):
        jcl.align(source, target, method="select")
    assert choose_method(source, target).method != "select"
    with pytest.raises(jcl.UsageError, match="finds the layers by their weights, here 0,1,2,3"):
        jcl.align(source, source, method="select", depth=[0, 1, 1, 3])


def test_mix_of_two_bases_does_not_consist_of_parts(tmp_path):
    """The source's layers could be used, but neither base contains all parts of the other."""
    made, other = make(), make(seed=1)
    layers = {name: x for name, x in other.tensors.items() if name.startswith(("model.layers.1.", "model.layers.3."))}
    target = dataclasses.replace(made, tensors=made.tensors | layers).write(tmp_path / "target")
    assert choose_method(made.write(tmp_path / "source"), target).method != "select"
