"""Adapters of other kinds in whole transfers: to another base, in each profile, through Python and the command."""

import dataclasses
import json

import numpy as np
import pytest
from adapter_folders import delta
from command_line import main
from engine_readers import gguf_factors, in_profile, mlx_factors, peft_factors
from full_set import full_except
from kind_cases import FULL, MADE, lora, make_adapter, peft
from probe_bases import write_base
from recording import recorded
from tiny_bases import random_adapter, write_llama
from tiny_models import tiny_model
from transfers import move_files, transfer_settings

import jcrosslora as jcl
from jcrosslora import read_plan, run_batch, transfer_files
from jcrosslora.checkpoint import load_tokenizer
from jcrosslora.decoder import stack_adapter
from jcrosslora.errors import AdapterError, MethodError, OutputError
from jcrosslora.maps.method import Plan
from jcrosslora.maps.other_changes import translate, with_invocation
from jcrosslora.maps.shift import checked_adapter
from jcrosslora.methods import PadTruncate
from jcrosslora.session.job import Job
from jcrosslora.session.session import Session
from jcrosslora.session.settings import TransferOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]


# Profile -> a reader written from the documentation of the format; test_export_peft uses peft itself.
PROFILES = {"portable": peft_factors, "peft": peft_factors, "mlx": mlx_factors, "gguf": gguf_factors}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """The base of peft's adapters, a wider and shallower target, and the transport between them."""
    folder = tmp_path_factory.mktemp("house")
    tiny_model("llama").save_pretrained(folder / "source")
    write_llama(folder / "target", seed=1, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, layers=2)
    source, target = jcl.open_base(folder / "source"), jcl.open_base(folder / "target")
    return folder, source, target, jcl.align(source, target, method="pad-truncate", depth="by-name")


@pytest.mark.parametrize("kind", full_except(MADE, ["LoRA", "DoRA", "PiSSA", "VeRA", "aLoRA"]))
def test_every_kind_survives_a_transfer_in_each_profile(tmp_path, house, kind):
    _, source, target, transport = house
    make_adapter(next(iter(MADE[kind].values()))(), tmp_path / "adapter")
    adapter = jcl.load_adapter(tmp_path / "adapter", source, rank=FULL)
    if kind == "aLoRA":
        adapter = dataclasses.replace(adapter, info=dataclasses.replace(adapter.info, invocation_target=(1, 2)))
    moved = jcl.shift(transport, adapter)
    wanted = {name: delta(factors) for name, factors in adapter.modules.items() if name in target.modules}
    if kind == "aLoRA":
        with pytest.raises(jcl.OutputError, match="MLX does not know"):
            moved.save(tmp_path / "mlx", profile="mlx")
    heads = target.dims.heads, target.dims.kv_heads
    for profile in PROFILES if kind != "aLoRA" else PROFILES.keys() - {"mlx"}:
        out = moved.save(tmp_path / profile, profile=profile)
        back, by_documentation = jcl.load_adapter(out), PROFILES[profile](out, heads)
        assert back.modules.keys() == wanted.keys()
        assert len(by_documentation) == len(wanted)
        for name, change in wanted.items():
            other = by_documentation[in_profile(name, profile)]
            for factors in (back.modules[name], other):
                rows, columns = change.shape
                np.testing.assert_allclose(delta(factors)[:rows, :columns], change, rtol=0, atol=1e-4)
        assert back.info.kind == ("aLoRA" if kind == "aLoRA" else "LoRA")
        assert back.info.invocation == ((1, 2) if kind == "aLoRA" else None)


@pytest.mark.parametrize("init", ["use_dora", "pissa"])
def test_the_command_transfers_kinds_and_says_how_they_were_read(tmp_path, house, capsys, init):
    folder, _, _, _ = house
    one = {"target_modules": ["q_proj"]}
    config = lora(use_dora=True, **one) if init == "use_dora" else lora(init_lora_weights="pissa", **one)
    make_adapter(config, tmp_path / "adapter")
    main(["inspect", str(tmp_path / "adapter"), "--base", str(folder / "source")])
    assert "kind: " in capsys.readouterr().out
    given = [str(tmp_path / "adapter"), "--source", str(folder / "source"), "--target", str(folder / "target")]
    main(["transfer", *given, "--out", str(tmp_path / "out"), "--method", "pad-truncate", "--adapter-rank", "3"])
    name = "DoRA" if init == "use_dora" else "PiSSA"
    assert f"warning: the adapter is {name} (" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "transfer_report.json").read_text())
    assert report["adapter"]["kind"] == name
    assert "at rank 3, which loses" in report["adapter"]["read_as"]
    assert "adapter_rank = 3\n" in report["recipe_toml"]
    assert {factors.rank for factors in jcl.load_adapter(tmp_path / "out").modules.values()} == {3}


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    """Two bases with different tokenizers, and an aLoRA of the first."""
    folder = tmp_path_factory.mktemp("tokenized")
    source = jcl.open_base(write_base(folder / "source", 60))
    target = jcl.open_base(write_base(folder / "target", 10, seed=1))
    tokens = load_tokenizer(source).encode("Let us see: Water", special=False).ids.tolist()
    plain = random_adapter(source, roles={"q_proj", "v_proj"})
    info = dataclasses.replace(plain.info, invocation=tuple(tokens), kind="aLoRA")
    jcl.save_adapter(dataclasses.replace(plain, info=info), folder / "adapter", base_name="org/source")
    return folder, source, target, tokens


def test_invocation_tokens_are_translated_to_the_target(tmp_path, tokenized):
    folder, _, target, tokens = tokenized
    settings = transfer_settings(
        adapter=str(folder / "adapter"),
        source=str(folder / "source"),
        target=str(folder / "target"),
        out=str(tmp_path / "out"),
        method="pad-truncate",
    )
    transfer_files(settings)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    found = config["alora_invocation_tokens"]
    assert len(found) > len(tokens)
    assert load_tokenizer(target).backend.decode(found) == "Let us see: Water"
    assert peft.LoraConfig.from_pretrained(tmp_path / "out").alora_invocation_tokens == found
    with pytest.raises(MethodError, match="acts only after"):
        transfer_files(dataclasses.replace(settings, out=str(tmp_path / "other"), method="distill"))
    assert not (tmp_path / "other").exists()


def test_a_profile_without_invocations_is_refused_before_any_work(tmp_path, tokenized):
    folder, source, target, _ = tokenized
    where = {name: str(folder / name) for name in ("adapter", "source", "target")}
    settings = {"method": "pad-truncate", "profile": "mlx", "out_rank": 4}
    jcl.save_adapter(random_adapter(source, roles={"q_proj"}), tmp_path / "plain", base_name="org/source")
    bases = "".join(f'{name} = "{where[name]}"\n' for name in ("source", "target"))
    adapters = f'source = ["{where["adapter"]}", "{tmp_path / "plain"}"]\n'
    move = '[[moves]]\nfrom = "source"\nto = "target"\nmethods = ["pad-truncate"]\nout_rank = 4\n'
    move += 'profile = "mlx"\n'
    (tmp_path / "plan.toml").write_text(f'out = "moved"\n[bases]\n{bases}[adapters]\n{adapters}{move}')
    found = run_batch(read_plan(tmp_path / "plan.toml")).outcomes
    assert [outcome.status for outcome in found.values()] == ["failed", "done"]
    assert "which MLX does not know" in found["adapter--target--pad-truncate"].text
    said = r"does not know: write it in one of the profiles portable, peft, gguf"
    with pytest.raises(OutputError, match=said):
        move_files(**where, out=str(tmp_path / "out"), **settings)
    (source, read), (target, also_read) = recorded(source), recorded(target)
    adapter, options = jcl.load_adapter(where["adapter"], source), TransferOptions(out_rank=4)
    with pytest.raises(OutputError, match=said):
        Session(source, target).transfer(Job(adapter, PadTruncate(), options, profile="mlx"))
    assert not read.read + also_read.read
    exported = jcl.ExportSettings((where["adapter"],), str(tmp_path / "out"), profile="mlx", out_rank=4)
    with pytest.raises(OutputError, match="aLoRA"):
        jcl.export_adapter(dataclasses.replace(exported, base=where["source"]))
    assert not (tmp_path / "out").exists()


def test_auto_maps_an_alora_and_says_why(tmp_path, tokenized):
    """Auto would fit predictions between these bases, but an inactive aLoRA does not change predictions."""
    folder, source, target, _ = tokenized
    assert jcl.compare_bases(source, target).choice.method == "distill"
    where = {name: str(folder / name) for name in ("adapter", "source", "target")} | {"svd_rank": 8}
    moved = move_files(**where, out=str(tmp_path / "auto"))
    assert moved.report.recipe.method == "cross-lora"
    assert "no base can be run with an adapter that acts only after its invocation tokens" in moved.report.choice
    named = move_files(**where, out=str(tmp_path / "named"), method="cross-lora")
    for name, factors in named.adapter.modules.items():
        np.testing.assert_array_equal(delta(moved.adapter.modules[name]), delta(factors))
    assert moved.adapter.info.invocation == named.adapter.info.invocation
    with pytest.raises(MethodError, match="its effect cannot be measured"):
        move_files(**where, out=str(tmp_path / "o"), method="cross-lora", effect="always")


@pytest.mark.full
def test_a_batch_moves_aloras_by_maps_beside_others_that_are_fitted(tmp_path, tokenized):
    folder, source, _, _ = tokenized
    jcl.save_adapter(random_adapter(source, roles={"q_proj"}), tmp_path / "plain", base_name="org/source")
    bases = "".join(f'{name} = "{folder / name}"\n' for name in ("source", "target"))
    adapters = f'source = ["{folder / "adapter"}", "{tmp_path / "plain"}"]\n'
    move = '[[moves]]\nfrom = "source"\nto = "target"\nsvd_rank = 8\ncompletions = 16\ndiscovery = 0\n'
    (tmp_path / "plan.toml").write_text(f'out = "moved"\n[bases]\n{bases}[adapters]\n{adapters}{move}')
    moved, fitted = run_batch(read_plan(tmp_path / "plan.toml")).outcomes.values()
    # The base, which is random, writes no completions to fit anything to.
    assert (moved.status, fitted.status) == ("done", "failed")
    assert "prompts, 16 are needed" in fitted.text
    report = json.loads((tmp_path / "moved" / "adapter--target--auto" / "transfer_report.json").read_text())
    assert (report["recipe"]["method"], report["recipe"]["settings"]) == ("cross-lora", {"svd_rank": 8})
    assert "invocation tokens" in report["choice"]


def test_invocation_tokens_without_a_translation_are_refused(tokenized, tmp_path):
    _, source, target, tokens = tokenized
    src, tgt = load_tokenizer(source), load_tokenizer(target)
    # "w" and "a" as two tokens, which the source tokenizer would not produce for a text.
    apart = [token for letter in "Water" for token in src.encode(letter, special=False).ids.tolist()]
    with pytest.raises(AdapterError, match="would not be found in text"):
        translate(apart, src, tgt, "it")
    with pytest.raises(AdapterError, match=f"has token {src.vocab}"):
        translate([src.vocab], src, tgt, "it")
    lower = write_base(tmp_path / "lower", 10)
    whole = json.loads((lower / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (lower / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(AdapterError, match="becomes 'let us see: water' in the tokens of"):
        translate(tokens, src, load_tokenizer(jcl.open_base(lower)), "it")


def test_an_alora_is_never_treated_as_always_active(tokenized):
    folder, source, target, _ = tokenized
    adapter = jcl.load_adapter(folder / "adapter")
    with pytest.raises(AdapterError, match="with_invocation"):
        checked_adapter(Plan(PadTruncate(), target, adapter), "portable")
    moved = jcl.shift(jcl.align(source, target, method="pad-truncate"), adapter).adapter
    assert moved.info.invocation == with_invocation(adapter, source, target).info.invocation_target
    assert moved.info.kind == "aLoRA"
    with pytest.raises(AdapterError, match="invocation tokens"):
        stack_adapter(adapter, source)
    plain = random_adapter(source)
    assert with_invocation(plain, source, target) is plain


def test_a_dora_is_merged_exactly_and_an_alora_refused(tmp_path, house):
    folder, source, _, _ = house
    make_adapter(lora(use_dora=True, target_modules=["q_proj", "down_proj"]), tmp_path / "dora")
    jcl.merge(jcl.MergeSettings(str(folder / "source"), str(tmp_path / "dora"), str(tmp_path / "merged")))
    merged, change = jcl.open_base(tmp_path / "merged"), jcl.load_adapter(tmp_path / "dora", source, rank=FULL)
    assert len(change.modules) == 2 * source.dims.layers
    for name, factors in change.modules.items():
        np.testing.assert_allclose(merged.weight(name), source.weight(name) + delta(factors), rtol=0, atol=1e-5)
    make_adapter(next(iter(MADE["aLoRA"].values()))(), tmp_path / "alora")
    with pytest.raises(AdapterError, match="invocation"):
        jcl.merge(jcl.MergeSettings(str(folder / "source"), str(tmp_path / "alora"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_invocation_tokens_are_written_in_every_profile_that_holds_them(tmp_path, house):
    folder, source, _, _ = house
    make_adapter(next(iter(MADE["aLoRA"].values()))(), tmp_path / "alora")
    wanted = jcl.load_adapter(tmp_path / "alora", source).info.invocation
    assert wanted
    for profile in ("portable", "peft"):
        settings = jcl.ExportSettings((str(tmp_path / "alora"),), str(tmp_path / profile), profile)
        jcl.export_adapter(settings)
        assert jcl.load_adapter(tmp_path / profile, source).info.invocation == wanted
    gguf = pytest.importorskip("gguf")
    where = {"base": str(folder / "source"), "out": str(tmp_path / "gguf")}
    jcl.export_adapter(jcl.ExportSettings((str(tmp_path / "alora"),), profile="gguf", **where))
    field = gguf.GGUFReader(tmp_path / "gguf" / "adapter.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.contents() == list(wanted)
    with pytest.raises(jcl.OutputError, match="MLX does not know"):
        jcl.export_adapter(jcl.ExportSettings((str(tmp_path / "alora"),), str(tmp_path / "mlx"), "mlx"))
    assert not (tmp_path / "mlx").exists()
