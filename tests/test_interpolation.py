"""A copied adapter with a share of the difference between the weights of the two bases."""

import json
import re
import tomllib

import numpy as np
import pytest
from checkpoint_files import write_safetensors
from command_line import main
from recording import recorded
from relatives import DTYPES, layer_of, make, merged, noisy, then
from tiny_bases import delta, random_adapter
from transfers import move_files

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.methods import InterpolatedCopy
from jcrosslora.methods.copy import ENERGY, interpolate_to_source
from jcrosslora.session.job import Job
from jcrosslora.session.session import Session
from jcrosslora.session.settings import TransferOptions

RANK = 3
EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A base, and one in whose weights a LoRA of rank 3 was merged in all modules but k."""
    folder, made = tmp_path_factory.mktemp("lineage"), make("llama")
    roles = tuple(role for role in EVERYWHERE if role != "k_proj")
    target = then(merged(RANK, 0.4, roles=roles))(made)
    return made.write(folder / "source"), target.write(folder / "target")


def difference(source, target, name):
    return np.asarray(source.weight(name), np.float64) - np.asarray(target.weight(name), np.float64)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_merged_lora_is_recovered_at_its_rank_in_its_modules(bases, share):
    modules, kept = interpolate_to_source(*bases, share, rank=320)
    assert {name.rpartition(".")[2] for name in modules} == set(EVERYWHERE) - {"k_proj"}
    assert list(modules) == [name for name in bases[1].modules if name in modules]
    assert kept > ENERGY
    for name, factors in modules.items():
        wanted = share * difference(*bases, name)
        assert factors.rank <= RANK
        # What is cut off is below 1% of the squared norm.
        assert np.linalg.norm(delta(factors) - wanted) < 0.1 * np.linalg.norm(wanted)


def test_difference_of_full_rank_is_truncated_optimally(tmp_path):
    made = make("llama")
    source, target = made.write(tmp_path / "source"), then(noisy(0.3))(made).write(tmp_path / "target")
    modules, kept = interpolate_to_source(source, target, 1.0, rank=4)
    whole = left = 0.0
    for name, factors in modules.items():
        s = np.linalg.svd(difference(source, target, name), compute_uv=False)
        rest = np.linalg.norm(delta(factors) - difference(source, target, name))
        assert factors.rank == 4
        np.testing.assert_allclose(rest**2, (s[4:] ** 2).sum(), rtol=1e-3)
        whole, left = whole + (s**2).sum(), left + (s[:4] ** 2).sum()
    assert modules.keys() == source.modules.keys()
    assert kept == pytest.approx(left / whole, rel=1e-4)
    assert kept < 0.8


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_equal_bases_give_an_empty_difference(bases, share):
    modules, kept = interpolate_to_source(bases[0], bases[0], share, rank=8)
    assert not modules
    assert kept == 1


def transfer(bases, adapter, tmp_path, **changes):
    jcl.save_adapter(adapter, tmp_path / "adapter", base_name="org/src", overwrite=True)
    where = {"source": str(bases[0].path), "target": str(bases[1].path), "out": str(tmp_path / "out")}
    return move_files(str(tmp_path / "adapter"), **where | changes)


def test_interpolation_of_1_gives_the_adapted_source(bases, tmp_path):
    source, target = bases
    adapter = random_adapter(source, rank=2, roles={"q_proj", "k_proj"})
    moved = transfer(bases, adapter, tmp_path, method="interpolated-copy", interpolation=1.0)
    assert list(moved.adapter.modules) == list(target.modules)
    for name, factors in moved.adapter.modules.items():
        adapted = np.asarray(source.weight(name), np.float64)
        if name in adapter.modules:
            adapted = adapted + delta(adapter.modules[name])
        found = np.asarray(target.weight(name), np.float64) + delta(factors)
        far = np.linalg.norm(difference(source, target, name)) + np.linalg.norm(adapted)
        assert np.linalg.norm(found - adapted) < 0.1 * far, name


def test_interpolation_of_0_equals_copy(bases, tmp_path):
    adapter = random_adapter(bases[0])
    copied = transfer(bases, adapter, tmp_path, method="copy")
    moved = transfer(
        bases, adapter, tmp_path, method="interpolated-copy", interpolation=0.0, out=str(tmp_path / "other")
    )
    assert moved.adapter.modules.keys() == copied.adapter.modules.keys()
    for name, factors in moved.adapter.modules.items():
        np.testing.assert_array_equal(delta(factors), delta(copied.adapter.modules[name]))


def test_report_describes_the_addition_and_the_recipe_reproduces_it(bases, tmp_path):
    adapter = random_adapter(bases[0], roles={"v_proj"})
    moved = transfer(bases, adapter, tmp_path, method="interpolated-copy", interpolation=0.25, scale=2.0)
    assert moved.report.added.startswith(
        "25% of the difference from the target's weights to the source's is added to the copy"
    )
    assert f"ranks up to {RANK}" in moved.report.added
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Added\n\n25% of the difference" in card
    stored = json.loads((tmp_path / "out" / "transfer_report.json").read_text(encoding="utf-8"))
    recipe = tomllib.loads(stored["recipe_toml"])
    assert (recipe["interpolation"], recipe["scale"]) == (0.25, 2.0)
    places = {
        "adapter": tmp_path / "adapter",
        "source": bases[0].path,
        "target": bases[1].path,
        "out": tmp_path / "again",
    }
    again = move_files(**recipe | {name: str(place) for name, place in places.items()})
    for name, factors in moved.adapter.modules.items():
        np.testing.assert_array_equal(factors.b, again.adapter.modules[name].b)
    for row in moved.report.rows:
        np.testing.assert_allclose(row.norm_after, np.linalg.norm(delta(moved.adapter.modules[row.target])), rtol=1e-4)


@pytest.mark.parametrize(
    ("interpolation", "why"),
    [(0.0, "an interpolation of 0 was asked for"), (0.75, "the two bases have the same weights in all modules")],
)
def test_report_says_why_nothing_was_added(bases, tmp_path, interpolation, why):
    pair = bases if interpolation == 0 else (bases[0], bases[0])
    moved = transfer(pair, random_adapter(bases[0]), tmp_path, method="interpolated-copy", interpolation=interpolation)
    assert moved.report.added.startswith("nothing is added to the copy: ")
    assert why in moved.report.added


def test_modules_without_an_adapter_update_are_not_rescaled_by_truncation(bases, tmp_path):
    adapter = random_adapter(bases[0], rank=4, roles={"q_proj"})
    moved = transfer(bases, adapter, tmp_path, method="interpolated-copy", calibrate="frobenius", out_rank=2)
    whole = transfer(bases, adapter, tmp_path, method="interpolated-copy", out=str(tmp_path / "whole"))
    for name, factors in moved.adapter.modules.items():
        s = np.linalg.svd(delta(whole.adapter.modules[name]), compute_uv=False)
        wanted = s if name in adapter.modules else s[:2]
        np.testing.assert_allclose(np.linalg.norm(delta(factors)), np.linalg.norm(wanted), rtol=1e-3)
        assert factors.rank == 2


def test_a_kept_norm_is_that_of_the_sum(bases, tmp_path):
    """Also where the sum is much larger than the adapter, and the rank that is asked for loses nothing of it."""
    adapter = random_adapter(bases[0], rank=2, scale=0.01)
    plain = transfer(bases, adapter, tmp_path, method="interpolated-copy")
    rank = max(factors.rank for factors in plain.adapter.modules.values())
    how = {"calibrate": "frobenius", "out_rank": rank, "out": str(tmp_path / "cut")}
    found = transfer(bases, adapter, tmp_path, method="interpolated-copy", **how)
    for name, factors in plain.adapter.modules.items():
        np.testing.assert_allclose(delta(found.adapter.modules[name]), delta(factors), atol=1e-5)


def test_parts_of_a_fused_matrix_keep_their_shared_factor(tmp_path):
    made = make("phi3")
    source = made.write(tmp_path / "source")
    target = then(merged(RANK, 0.4, roles=("qkv_proj", "gate_up_proj")))(made).write(tmp_path / "target")
    held = [module.tensor.removesuffix(".weight") for module in source.modules.values()]
    modules = {}
    for name in dict.fromkeys(held):
        rows, columns = source.stored_weight(name).shape
        rng = np.random.default_rng(rows)
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, columns), (rows, 2)))
        modules[name] = jcl.LoRAFactors(a=a, b=b)
    adapter = jcl.Adapter(modules)
    moved = transfer((source, target), adapter, tmp_path, method="interpolated-copy", interpolation=1.0, profile="peft")
    written = jcl.load_adapter(tmp_path / "out")
    assert written.modules.keys() == modules.keys()
    for name, factors in written.modules.items():
        parts = source.fused.get(name, ())
        # Each part has a difference of its own; of the adapter's two directions there are two, whatever the parts.
        assert factors.rank == 2 + RANK * len(parts)
        wanted = delta(modules[name]) + source.stored_weight(name) - target.stored_weight(name)
        assert np.linalg.norm(delta(factors) - wanted) < 0.05 * np.linalg.norm(wanted)
    for row in moved.report.rows:
        np.testing.assert_allclose(row.norm_after, np.linalg.norm(delta(moved.adapter.modules[row.target])), rtol=1e-4)


@pytest.mark.parametrize("method", ["interpolated-copy", "compensated-copy"])
def test_bases_with_other_modules_are_refused_before_text_is_written(bases, tmp_path, method):
    fewer = make("llama", num_hidden_layers=2).write(tmp_path / "fewer")
    with pytest.raises(
        MethodError, match=rf"method {method} adds a difference of weights, and .* differ in model\.lay"
    ):
        jcl.transfer(random_adapter(bases[0]), bases[0], fewer, method, cache=False)


def test_layers_of_different_dtypes_are_interpolated_together(bases, tmp_path):
    """numpy has no dtype that holds both float16 and bfloat16."""
    made = make("llama")
    of_layer = ("F16", "BF16", "F32", "F16")
    stored = {}
    for name, x in made.tensors.items():
        dtype = "F32" if layer_of(name) is None else of_layer[layer_of(name)]
        stored[name] = (dtype, x.astype(DTYPES[dtype]))
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    write_safetensors(tmp_path / "model.safetensors", stored)
    mixed = jcl.open_base(tmp_path)
    found, _ = interpolate_to_source(mixed, bases[0], 1.0, rank=64)
    assert {int(name.split(".")[2]) for name in found} == {0, 1, 3}
    for name, factors in found.items():
        wanted = difference(mixed, bases[0], name)
        assert np.linalg.norm(delta(factors) - wanted) < 0.11 * np.linalg.norm(wanted)


def test_auto_chooses_interpolated_copy_for_a_merged_lora(bases, tmp_path):
    moved = transfer(bases, random_adapter(bases[0]), tmp_path)
    assert moved.report.recipe.method == "interpolated-copy"
    assert "LoRA-merged" in moved.report.choice
    assert moved.report.effect is None  # no base was run


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_interpolation_outside_0_to_1_is_refused(bases, tmp_path, share):
    with pytest.raises(UsageError, match=f"interpolation {share:g} is out of range"):
        transfer(bases, random_adapter(bases[0]), tmp_path, method="interpolated-copy", interpolation=share)
    assert not (tmp_path / "out").exists()


def test_bases_of_different_shapes_are_refused(bases, tmp_path):
    other = make("llama", hidden_size=96).write(tmp_path / "wider")
    with pytest.raises(MethodError, match="interpolated-copy"):
        transfer((bases[0], other), random_adapter(bases[0]), tmp_path, method="interpolated-copy")


def test_bases_of_different_depth_are_refused(bases, tmp_path):
    deeper = make("llama", num_hidden_layers=5).write(tmp_path / "deeper")
    with pytest.raises(MethodError, match=r"differ in model.layers.4.self_attn.q_proj"):
        transfer((bases[0], deeper), random_adapter(bases[0]), tmp_path, method="interpolated-copy")
    assert not (tmp_path / "out").exists()


def test_batch_by_interpolated_copy_equals_single_transfers(bases, tmp_path, capsys):
    adapter = random_adapter(bases[0])
    moved = transfer(bases, adapter, tmp_path, method="interpolated-copy")
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'out = "moved"\n[bases]\na = "{bases[0].path}"\nb = "{bases[1].path}"\n[adapters]\na = ["adapter"]\n'
        '[[moves]]\nfrom = "a"\nto = ["b"]\nmethods = ["interpolated-copy"]\n'
    )
    main(["batch", str(plan), "--dry-run"])
    shown = capsys.readouterr().out
    assert re.search(r"│ +\d+ s +│", shown)  # the decompositions of the difference
    assert "both bases" not in shown  # none is run
    assert run_batch(read_plan(plan)).count("done") == 1
    (folder,) = {path.parent for path in (tmp_path / "moved").rglob("adapter_model.safetensors")}
    written = jcl.load_adapter(folder)
    for name, factors in moved.adapter.modules.items():
        np.testing.assert_allclose(delta(written.modules[name]), delta(factors), atol=1e-6)
    assert run_batch(read_plan(plan)).count("kept") == 1


def test_difference_is_decomposed_once_for_all_adapters(bases):
    source, (target, store) = bases[0], recorded(bases[1])
    session, read = Session(source, target), []
    for seed, share in enumerate((0.75, 0.75, 0.5)):
        transport = jcl.align(source, target, InterpolatedCopy(interpolation=share))
        adapter = random_adapter(source, seed=seed)
        job = Job(adapter, transport.method, TransferOptions())
        plan = session.plan(job, adapter, transport)
        store.read.clear()
        session.finish(session.ready(plan, job), job)
        read.append(bool(store.read))
    assert read == [True, False, True]


@pytest.mark.full
def test_batch_of_several_interpolations_equals_single_transfers(bases, tmp_path):
    shares, settings = {"a0": 0.75, "a1": 0.75, "a2": 0.5}, {"method": "interpolated-copy", "out_rank": 2}
    alone = {}
    for seed, (name, share) in enumerate(shares.items()):
        changes = {"interpolation": share, "out": str(tmp_path / name)} | settings
        alone[name] = transfer(bases, random_adapter(bases[0], seed=seed), tmp_path, **changes)
        jcl.save_adapter(random_adapter(bases[0], seed=seed), tmp_path / "adapters" / name, base_name="org/src")
    plan = tmp_path / "plan.toml"
    head = f'out = "moved"\n[bases]\na = "{bases[0].path}"\nb = "{bases[1].path}"\n[adapters]\na = ["adapters/*"]\n'
    move = '[[moves]]\nfrom = "a"\nto = ["b"]\nmethods = ["interpolated-copy"]\nout_rank = 2\nadapters = '
    plan.write_text(f'{head}{move}["a0", "a1"]\n{move}["a2"]\ninterpolation = 0.5\n')
    summary = run_batch(read_plan(plan))
    assert summary.count("done") == 3, summary
    for outcome in summary.outcomes.values():
        (name,) = [name for name in shares if name in outcome.name]
        written = jcl.load_adapter(outcome.out)
        for module, factors in alone[name].adapter.modules.items():
            np.testing.assert_allclose(delta(written.modules[module]), delta(factors), atol=1e-6)
