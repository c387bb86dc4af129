"""Whole transfers on tiny bases, through Python and through the command."""

import dataclasses
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from command_line import main
from probe_bases import write_move
from safetensors.numpy import load_file, save_file
from tiny_bases import delta, random_adapter, write_llama
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora import EvidenceKind, transfer_files
from jcrosslora.errors import MethodError, UsageError
from jcrosslora.methods import CrossLoRA
from jcrosslora.relation import DEPTH_MAPS

METHODS = {name: method() for name, method in jcl.methods.METHODS.items()}
WIDER = {"hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 40, "intermediate": 112, "layers": 2, "vocab": 120}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A source base, a wider and shallower target that shares 76 tokens, a twin of the source, and an adapter."""
    folder = tmp_path_factory.mktemp("bases")
    write_llama(folder / "source", seed=0)
    write_llama(folder / "target", seed=1, first_token=20, **WIDER)
    write_llama(folder / "twin", seed=0)
    jcl.save_adapter(
        random_adapter(jcl.open_base(folder / "source"), scale=0.5), folder / "adapter", base_name="org/src"
    )
    return folder


def settings(files, out, **changes):
    names = {"adapter": files / "adapter", "source": files / "source", "target": files / "target", "out": out}
    return transfer_settings(**({key: str(value) for key, value in names.items()} | changes))


def command(files, out, *flags):
    given = [str(files / "adapter"), "--source", str(files / "source"), "--target", str(files / "target")]
    main(["transfer", *given, "--out", str(out), *flags])


@pytest.mark.parametrize(
    "method",
    [
        name
        for name, method in METHODS.items()
        if not (method.fits_update or method.equal_shapes or method.runs_bases)
        and EvidenceKind.SELECTION not in method.requires
    ],
)
def test_every_method_moves_between_unequal_shapes_from_file_to_file(files, tmp_path, method):
    moved = transfer_files(settings(files, tmp_path / "out", method=method))
    target = jcl.open_base(files / "target")
    again = jcl.load_adapter(tmp_path / "out")
    assert again.modules.keys() == target.modules.keys()
    for name, factors in again.modules.items():
        assert factors.shape == target.modules[name].shape
        assert factors.rank == 4
        np.testing.assert_allclose(delta(factors), delta(moved.adapter.modules[name]), atol=1e-5)
    norms = [(row.norm_before, row.norm_after) for row in moved.report.rows]
    if method == "random":
        np.testing.assert_allclose(*zip(*norms, strict=True), rtol=1e-4)


@pytest.mark.parametrize(
    "method",
    [name for name, method in METHODS.items() if not (method.fits_update or method.runs_bases) and method.equal_shapes],
)
def test_every_method_moves_between_equal_shapes(files, tmp_path, method):
    moved = transfer_files(settings(files, tmp_path / "out", method=method, target=str(files / "twin")))
    adapter = jcl.load_adapter(files / "adapter")
    ranks = {factors.rank for factors in jcl.load_adapter(tmp_path / "out").modules.values()}
    assert ranks == {8 if method == "prolora" else 4}
    if method == "copy":
        for name, factors in moved.adapter.modules.items():
            np.testing.assert_array_equal(delta(factors), delta(adapter.modules[name]))
    assert "one and the same base (equal digests)" in jcl.verdict(moved.report).text


def test_align_then_shift_equals_transfer(files, tmp_path):
    moved = transfer_files(settings(files, tmp_path / "out", method="cross-lora", svd_rank=20))
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    transport = jcl.align(source, target, CrossLoRA(svd_rank=20))
    again = jcl.shift(transport, jcl.load_adapter(files / "adapter"))
    assert again.report.to_json() == moved.report.to_json()
    for name, factors in again.adapter.modules.items():
        np.testing.assert_array_equal(factors.b, moved.adapter.modules[name].b)


def test_transport_without_bases_works_with_apply_but_not_shift(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    adapter, transport = jcl.load_adapter(files / "adapter"), jcl.align(source, target, "pad-truncate")
    alone = transport.replace(bases=None)
    with pytest.raises(MethodError, match=r"lost its bases, which shift needs; use jcrosslora\.apply"):
        jcl.shift(alone, adapter)
    assert jcl.apply(alone, adapter).keys() == jcl.shift(transport, adapter).adapter.modules.keys()


def test_small_groups_and_one_large_group_give_equal_results(files, monkeypatch):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    adapter = jcl.load_adapter(files / "adapter")
    large = jcl.shift(jcl.align(source, target, method="random", seed=3), adapter)
    monkeypatch.setattr("jcrosslora.checkpoint.weight_stacks.GROUP_BYTES", 1)
    small = jcl.align(source, target, method="random", seed=3)
    # A device gets one pair each; without a pair it would repeat another's.
    assert {len(group.pairs) for group in small.groups} <= set(range(1, jax.device_count() + 1))
    assert len(small.groups) >= len(target.modules) / jax.device_count()
    for name, factors in jcl.shift(small, adapter).adapter.modules.items():
        np.testing.assert_allclose(delta(factors), delta(large.adapter.modules[name]), atol=1e-4)


def test_only_modules_of_the_adapter_are_aligned(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    adapter = random_adapter(source, roles={"q_proj", "v_proj"})
    transport = jcl.align(source, target, "pad-truncate", depth="by-name", sources=adapter.modules)
    roles = {pair.role for group in transport.groups for pair in group.pairs}
    assert roles == {"q_proj", "v_proj"}


def test_unmapped_sources_are_listed_with_their_share_of_the_update(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    adapter = random_adapter(source, roles={"q_proj"})
    moved = jcl.shift(jcl.align(source, target, "cross-lora", depth=[0, None]), adapter)
    energies = {name: np.sum(delta(factors) ** 2) for name, factors in adapter.modules.items()}
    total = sum(energies.values())
    left = {item.source: item.share for item in moved.report.unmapped_sources}
    assert set(left) == {name for name in energies if ".0." not in name}
    for name, share in left.items():
        assert share == pytest.approx(energies[name] / total, rel=1e-5)
    assert list(moved.adapter.modules) == ["model.layers.0.self_attn.q_proj"]
    assert len(moved.report.unmapped_targets) == 7


def test_out_rank_truncates_optimally(files):
    source, twin = jcl.open_base(files / "source"), jcl.open_base(files / "twin")
    adapter = random_adapter(source, rank=5, roles={"up_proj"})
    moved = jcl.shift(jcl.align(source, twin, method="copy"), adapter, out_rank=2)
    for name, factors in moved.adapter.modules.items():
        u, s, vt = np.linalg.svd(delta(adapter.modules[name]))
        np.testing.assert_allclose(delta(factors), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-3)
        assert factors.rank == 2


def test_modules_keep_their_different_ranks(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    one, two = random_adapter(source, rank=2, seed=0), random_adapter(source, rank=6, seed=1)
    mixed = jcl.Adapter({name: (one if "0" in name else two).modules[name] for name in source.modules})
    transport = jcl.align(source, target, method="pad-truncate", depth="by-name")
    moved = jcl.shift(transport, mixed)
    assert {name: factors.rank for name, factors in moved.adapter.modules.items()} == {
        name: 2 if "0" in name else 6 for name in target.modules
    }


def test_modules_stored_in_different_dtypes_are_stacked(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    adapter = random_adapter(source, roles={"q_proj"})
    first = "model.layers.0.self_attn.q_proj"
    halved = adapter.modules[first]
    halved = halved.replace(a=halved.a.astype(ml_dtypes.bfloat16), b=halved.b.astype(np.float16))
    transport = jcl.align(source, target, method="pad-truncate", depth="by-name")
    mixed = jcl.shift(transport, jcl.Adapter(adapter.modules | {first: halved}))
    plain = jcl.shift(transport, adapter)
    for name, factors in mixed.adapter.modules.items():
        np.testing.assert_allclose(delta(factors), delta(plain.adapter.modules[name]), atol=0.1 if name == first else 0)


def test_frobenius_calibration_restores_the_norm_of_every_module(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    transport = jcl.align(source, target, CrossLoRA(svd_rank=10))
    moved = jcl.shift(transport, jcl.load_adapter(files / "adapter"), calibrate="frobenius")
    for row in moved.report.rows:
        assert row.norm_after == pytest.approx(row.norm_before, rel=1e-4)
        assert row.kept < 0.9


@pytest.mark.parametrize(("scale", "calibrate"), [(0.6, None), (-2.0, "frobenius")])
def test_scale_multiplies_every_moved_update_and_its_reported_norm(files, scale, calibrate):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    transport, adapter = jcl.align(source, target, CrossLoRA(svd_rank=10)), jcl.load_adapter(files / "adapter")
    plain = jcl.shift(transport, adapter, calibrate=calibrate)
    moved = jcl.shift(transport, adapter, calibrate=calibrate, scale=scale)
    for name, factors in moved.adapter.modules.items():
        np.testing.assert_allclose(
            factors.b @ factors.a, scale * plain.adapter.modules[name].b @ plain.adapter.modules[name].a, rtol=1e-5
        )
    for row, before in zip(moved.report.rows, plain.report.rows, strict=True):
        assert row.kept == before.kept
        assert row.norm_after == pytest.approx(abs(scale) * before.norm_after, rel=1e-6)
    cut = jcl.shift(transport, adapter, calibrate="frobenius", scale=scale, out_rank=1)
    for row in cut.report.rows:
        assert row.norm_after == pytest.approx(abs(scale) * row.norm_before, rel=1e-4)


def test_scale_is_written_to_the_recipe(files, tmp_path):
    given = settings(files, tmp_path / "out", method="pad-truncate", scale=0.5)
    moved = transfer_files(given)
    assert "scale = 0.5" in json.loads((tmp_path / "out" / "transfer_report.json").read_text())["recipe_toml"]
    plain = transfer_files(dataclasses.replace(given, scale=1.0, out=str(tmp_path / "plain")))
    assert "scale" not in json.loads((tmp_path / "plain" / "transfer_report.json").read_text())["recipe_toml"]
    name = next(iter(moved.adapter.modules))
    np.testing.assert_array_equal(moved.adapter.modules[name].b, 0.5 * plain.adapter.modules[name].b)


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf])
def test_zero_or_non_finite_scale_is_refused(files, scale):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    transport, adapter = jcl.align(source, target, CrossLoRA(svd_rank=10)), jcl.load_adapter(files / "adapter")
    with pytest.raises(UsageError, match=f"scale {scale:g} is out of range"):
        jcl.shift(transport, adapter, scale=scale)


def test_zero_update_stays_zero_under_calibration(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    adapter = random_adapter(source, roles={"k_proj", "q_proj"})
    zeroed = {n: f.replace(b=np.zeros_like(f.b)) if "k_proj" in n else f for n, f in adapter.modules.items()}
    moved = jcl.shift(jcl.align(source, target, "cross-lora"), jcl.Adapter(zeroed), calibrate="frobenius")
    assert all(np.asarray(f.b).any() == ("q_proj" in n) for n, f in moved.adapter.modules.items())


def test_transfer_does_not_change_its_inputs(files):
    source, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    adapter = random_adapter(source)
    before = {name: (factors.a.copy(), factors.b.copy()) for name, factors in adapter.modules.items()}
    moved = jcl.shift(jcl.align(source, target, "cross-lora"), adapter)
    report = json.dumps(moved.report.to_json())
    jcl.shift(jcl.align(source, target, method="random"), adapter)
    for name, (a, b) in before.items():
        np.testing.assert_array_equal(adapter.modules[name].a, a)
        np.testing.assert_array_equal(adapter.modules[name].b, b)
    assert json.dumps(moved.report.to_json()) == report


# --- the command ---------------------------------------------------------------------------------------------------


def test_command_prints_table_and_verdict_and_writes_the_folder(files, tmp_path, capsys):
    command(files, tmp_path / "out", "--svd-rank", "20")
    printed = capsys.readouterr()
    for text in (
        "q_proj",
        "down_proj",
        "all",
        "SVDs: gram",
        "signs: fixed by the embeddings of 76 shared tokens",
        "not moved: 7",
    ):
        assert text in printed.out
    lines = printed.out.splitlines()
    end = next(place for place, line in enumerate(lines) if line.startswith("verdict: "))
    assert lines[end + 1] == f"written: {tmp_path / 'out'}"
    assert printed.err == ""
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    files = ("README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.toml", "transfer_report.json")
    assert written == list(files)


def test_report_json_lists_every_module_and_has_no_nan(files, tmp_path):
    command(files, tmp_path / "out")
    text = (tmp_path / "out" / "transfer_report.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert len(report["rows"]) == 14
    assert report["source"]["digest"].startswith("sha256:")
    assert report["recipe"]["signs"] == "vocabulary"
    # Of both bases, without those that only fill up the devices.
    assert sum(int(part.split()[-1]) for part in report["recipe"]["svd"].split(", ")) == 2 * 14
    assert report["recipe"]["svd"].startswith("gram ")
    assert report["rows"][0]["kept"] <= 1 + 1e-5  # float32
    assert report["verdict"]["level"]


def test_recipe_on_the_card_reproduces_the_adapter(files, tmp_path):
    command(
        files,
        tmp_path / "one",
        "--method",
        "random",
        "--seed",
        "7",
        "--svd-rank",
        "11",
        "--depth",
        "2,0",
        "--out-rank",
        "3",
    )
    card = (tmp_path / "one" / "README.md").read_text()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(card.split("```toml\n")[1].split("```")[0])
    assert tomllib.loads(recipe.read_text())["seed"] == 7
    command(files, tmp_path / "two", "--recipe", str(recipe))
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_recipe_names_the_chat_templates_and_is_toml(files, tmp_path, capsys):
    for name in ("source", "target"):
        (tmp_path / f"{name}.jinja").write_text("{{ messages[0]['content'] }}")
    given = ["--source-template", tmp_path / "source.jinja", "--target_template", tmp_path / "target.jinja"]
    module = ["--allow_module=user_methods"]  # flags may have underscores
    command(files, tmp_path / "one", "--method", "user_methods:Signed", "--negative", *map(str, given), *module)
    recipe = tomllib.loads((tmp_path / "one" / "recipe.toml").read_text())
    assert (recipe["source_template"], recipe["target_template"]) == ("source.jinja", "target.jinja")
    assert recipe["negative"] is True


def test_recipe_pins_the_commit_of_a_hub_adapter(files, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--tuned" / "snapshots" / "0123abcd"
    shutil.copytree(files / "adapter", snapshot)
    monkeypatch.setattr("jcrosslora.adapter.folder._download", lambda _, name, revision: snapshot / name)
    moved = transfer_files(settings(files, tmp_path / "out", method="pad-truncate", adapter="org/tuned"))
    assert moved.report.adapter.revision == "0123abcd"
    recipe = tomllib.loads(json.loads((tmp_path / "out" / "transfer_report.json").read_text())["recipe_toml"])
    assert (recipe["adapter"], recipe["adapter_revision"]) == ("org/tuned", "0123abcd")
    assert jcl.load_adapter(files / "adapter").info.revision is None


def test_the_folder_of_the_hubs_cache_is_not_written(files, tmp_path, monkeypatch):
    snapshot = tmp_path / "secret" / "models--org--tuned" / "snapshots" / "0123abcd"
    shutil.copytree(files / "adapter", snapshot)
    weights = snapshot / "adapter_model.safetensors"
    damaged = {f"base_model.model.model.embed_tokens.lora_embedding_{side}": np.full((2, 2), np.nan) for side in "AB"}
    save_file(load_file(weights) | damaged, weights)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "secret"))
    monkeypatch.setattr("jcrosslora.adapter.folder._download", lambda _, name, revision: snapshot / name)
    transfer_files(settings(files, tmp_path / "out", method="pad-truncate", adapter="org/tuned"))
    assert "NaN" in (tmp_path / "out" / "README.md").read_text()
    assert not [path for path in (tmp_path / "out").iterdir() if b"secret" in path.read_bytes()]


@pytest.mark.parametrize("profile", ["portable", "mlx", "gguf"])
def test_a_path_in_the_files_of_an_adapter_is_not_written(files, tmp_path, profile):
    if profile == "gguf":
        pytest.importorskip("gguf")
    mine = "/home/ann/secret/models/base"
    folder = shutil.copytree(files / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": mine}))
    (folder / "README.md").write_text(f"---\nlicense: other\nlicense_link: file://{mine}/LICENSE\n---\n")
    record = {"recipe": {"method": "copy"}, "source": {"name": mine}, "adapter": {"name": mine, "digest": "sha256:0"}}
    header = {f"jcrosslora.{name}": json.dumps(part) for name, part in record.items()}
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, header)
    given = settings(files, tmp_path / "out", method="pad-truncate", adapter=str(folder), profile=profile)
    report = transfer_files(given).report
    assert (report.adapter.base_name, report.adapter.earlier[0].adapter) == ("base", "base")
    assert not [path for path in (tmp_path / "out").iterdir() if b"secret" in path.read_bytes()]


def test_flags_override_the_recipe(files, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('method = "random"\nsvd_rank = 7\n')
    command(files, tmp_path / "out", "--recipe", str(recipe), "--svd-rank", "9")
    report = json.loads((tmp_path / "out" / "transfer_report.json").read_text())
    assert (report["recipe"]["method"], report["recipe"]["settings"]) == ("random", {"svd_rank": 9})


@pytest.mark.parametrize("depth", [*DEPTH_MAPS, "0,-"])
def test_depth_flag_selects_the_depth_map(files, tmp_path, depth):
    command(files, tmp_path / "out", "--depth", depth)
    report = json.loads((tmp_path / "out" / "transfer_report.json").read_text())
    assert report["layers"] == {"by-name": [0, 1], "proportional": [0, 2], "0,-": [0, None]}[depth]


def test_target_id_and_dtype_are_written_to_the_file(files, tmp_path):
    command(files, tmp_path / "out", "--target-id", "org/tgt", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tgt"
    factors = jcl.load_adapter(tmp_path / "out").modules["model.layers.0.mlp.up_proj"]
    assert factors.a.dtype.name == "bfloat16"
    assert "base_model: org/tgt\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_is_no_hub_id_is_refused_as_the_target_s(files, tmp_path):
    with pytest.raises(UsageError, match="target_id 'Gemma 3 270m' is no hub id: give OWNER/NAME"):
        settings(files, tmp_path / "out", target_id="Gemma 3 270m")


@pytest.mark.parametrize("quiet", [("--table", "none"), ("--json",)])
def test_a_transfer_ends_with_its_verdict_and_with_commands_that_work(tmp_path, capsys, monkeypatch, quiet):
    pytest.importorskip("matplotlib")  # of the report
    monkeypatch.chdir(tmp_path)
    write_move(tmp_path)
    command(tmp_path, "it's moved", "--method", "random", *quiet)
    said = capsys.readouterr().err
    assert said.startswith("verdict: this is a random map, a control")
    assert "note: the adapter names target as its base, which is no hub id" in said
    peft, evaluate, report = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    program, flag, code = shlex.split(peft)
    assert (program, flag) == ("python", "-c")
    compile(code, "pasted", "exec")
    assert 'PeftModel.from_pretrained(model, "it\'s moved")' in code
    Path("task.jsonl").write_text('{"prompt": "Question: What do bees make? Answer:", "answer": "honey"}\n')
    main(shlex.split(evaluate.removesuffix(" > answers.json"))[1:])
    Path("answers.json").write_text(capsys.readouterr().out)
    main(shlex.split(report)[1:])
    assert Path("it's moved/report.html").is_file()


def test_a_move_of_no_use_ends_with_what_would_help(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_move(tmp_path)
    command(tmp_path, "moved", "--method", "pad-truncate", "--table", "none")
    said = capsys.readouterr().err
    assert said.startswith("verdict: the coordinates of the two bases are unrelated")
    assert "Try another method than `pad-truncate`" in said
    assert "PeftModel" not in said
    assert "evaluate" not in said


def test_a_transfer_to_a_named_target_has_nothing_to_note(files, tmp_path, capsys):
    command(files, tmp_path / "out", "--method", "pad-truncate", "--target-id", "org/tgt")
    said = capsys.readouterr()
    assert "AutoPeftModel" not in said.out
    assert (said.out.count("verdict: "), said.err) == (1, "")


def test_overwrite_replaces_an_existing_adapter(files, tmp_path):
    command(files, tmp_path / "out", "--method", "random")
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    command(files, tmp_path / "out", "--overwrite")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_inspect_check_and_methods(files, tmp_path, capsys):
    main(["inspect", str(files / "adapter")])
    assert "can be moved: 21 modules" in capsys.readouterr().out
    main(["inspect", str(files / "source")])
    printed = capsys.readouterr().out
    assert "family: llama" in printed
    assert "3 layers, 48 wide" in printed
    main(["check", str(files / "adapter")])
    printed = capsys.readouterr().out
    for engine in ("PEFT", "vLLM", "SGLang", "llama.cpp", "MLX", "Ollama"):
        assert engine in printed
    command(files, tmp_path / "moved")
    capsys.readouterr()
    main(["check", str(tmp_path / "moved")])
    printed = capsys.readouterr().out
    assert "family of this base was not given" not in printed  # its report says that it is llama
    main(["methods"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in jcl.methods.METHODS)


def test_import_does_not_load_heavy_libraries():
    heavy = {"torch", "transformers", "peft", "gguf"}
    code = f"import sys, jcrosslora, jcrosslora.cli.main; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_one_device_and_two_give_equal_results(files, tmp_path):
    """This process has two devices; a fresh one has one."""
    transfer_files(settings(files, tmp_path / "two", svd_rank=20))
    flags = ["--source", files / "source", "--target", files / "target", "--out", tmp_path / "one", "--svd-rank", "20"]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    arguments = [sys.executable, "-m", "jcrosslora", "transfer", files / "adapter", *flags]
    subprocess.run(
        list(map(str, arguments)), check=True, capture_output=True, env=environment, cwd=Path(__file__).parent
    )
    one, two = (jcl.load_adapter(tmp_path / name) for name in ("one", "two"))
    for name in two.modules:
        np.testing.assert_allclose(delta(one.modules[name]), delta(two.modules[name]), atol=2e-4)


def test_warning_names_given_text_that_the_method_does_not_read(files, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("Water boils.\n")
    command(files, tmp_path / "out", "--method", "pad-truncate", "--prompts", str(tmp_path / "texts.txt"))
    assert "texts.txt was not read: method pad-truncate asks for none" in capsys.readouterr().out
