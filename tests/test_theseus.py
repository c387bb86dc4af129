"""Activation alignment from file to file on tiny bases with two different tokenizers."""

import json
import shutil

import numpy as np
import pytest
from command_line import main
from probe_bases import CORPUS, write_base
from tiny_bases import delta, random_adapter
from transfers import transfer_settings

import jcrosslora as jcl
from jcrosslora import Probes
from jcrosslora.errors import UsageError
from jcrosslora.methods import Theseus


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "source", 60, seed=0)
    write_base(folder / "target", 20, bos=True, seed=1, hidden=56, head_dim=14, layers=2)
    jcl.save_adapter(random_adapter(jcl.open_base(folder / "source")), folder / "adapter")
    (folder / "texts.txt").write_text("\n".join(CORPUS))
    return folder


def transfer(files, out, *flags):
    given = [files / "adapter", "--source", files / "source", "--target", files / "target", "--out", out]
    main(["transfer", *map(str, given), "--method", "theseus", *flags])


@pytest.mark.slow
def test_user_text_by_the_command_and_again_by_its_recipe(files, tmp_path, capsys):
    transfer(files, tmp_path / "one", "--prompts", str(files / "texts.txt"))
    printed = capsys.readouterr().out
    assert f"probes: {len(CORPUS)} texts read from texts.txt" in printed
    assert "verdict: activations are aligned" in printed
    report = json.loads((tmp_path / "one" / "transfer_report.json").read_text())
    assert all(0 < row["activation_cosine"] <= 1 for row in report["rows"])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(report["recipe_toml"])
    transfer(files, tmp_path / "two", "--recipe", str(recipe), "--prompts", str(files / "texts.txt"))
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.full
def test_source_writes_the_text_if_none_is_given(files, tmp_path):
    transfer(files, tmp_path / "out", "--probe-count", "6")
    report = json.loads((tmp_path / "out" / "transfer_report.json").read_text())
    assert report["recipe"]["probe_count"] == 6
    assert "6 texts written by" in report["recipe"]["probes"]
    assert len(jcl.load_adapter(tmp_path / "out").modules) == 14


def test_equal_bases_keep_the_part_that_probes_reach(files):
    """Orthogonal maps of a base to itself are the projections on the directions that its activations reach."""
    base = jcl.open_base(files / "source")
    adapter = random_adapter(base)
    transport = jcl.align(base, base, method="theseus", probes=Probes(tuple(CORPUS), "given"))
    moved = jcl.shift(transport, adapter)
    for row in moved.report.rows:
        assert row.activation_cosine == pytest.approx(1, abs=1e-3)
    for group in transport.groups:
        ((p_out, p_in),) = group.terms
        for linear_map in (p_out, p_in):
            for left, right in zip(np.asarray(linear_map.left), np.asarray(linear_map.right), strict=True):
                dense = left @ right.T
                np.testing.assert_allclose(dense, dense.T, atol=5e-2)
                np.testing.assert_allclose(dense @ dense, dense, atol=5e-2)
    assert set(moved.adapter.modules) == set(adapter.modules)
    assert moved.report.kept > 0.5
    whole = sum(np.sum(delta(f) * delta(adapter.modules[n])) for n, f in moved.adapter.modules.items())
    assert whole > 0.5 * sum(np.sum(delta(f) ** 2) for f in adapter.modules.values())


UNUSABLE = [(None, "absent.txt"), ("", "holds no text"), (b"\xff\xfe\x00", "absent.txt")]


@pytest.mark.parametrize(("content", "wanted"), UNUSABLE)
def test_invalid_text_files_are_refused(files, tmp_path, capsys, content, wanted):
    path = tmp_path / "absent.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SystemExit) as stopped:
        transfer(files, tmp_path / "out", "--prompts", str(path))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert wanted in error
    assert not (tmp_path / "out").exists()


def test_base_without_a_tokenizer_is_refused(files, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    for path in (files / "target").iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    given = [files / "adapter", "--source", files / "source", "--target", tmp_path / "bare", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stopped:
        main(["transfer", *map(str, given), "--method", "theseus", "--prompts", str(files / "texts.txt")])
    assert stopped.value.code == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_command_evaluates_a_moved_adapter(files, tmp_path, capsys):
    task = tmp_path / "task.jsonl"
    items = [{"question": f"What is {i}?", "choices": ["water", "light"], "answer": i % 2} for i in range(4)]
    task.write_text("\n".join(map(json.dumps, items)))
    adapters = [str(shutil.copytree(files / "adapter", tmp_path / name)) for name in ("one", "two", "three")]
    given = ["--base", str(files / "source"), "--data", str(task)]
    main(["evaluate", *given, "--adapter", *adapters[:2], "--adapter", adapters[2]])
    printed = capsys.readouterr().out
    assert "4 questions" in printed
    assert "accuracy" in printed
    # The base and all three: the option may be given once for several, or again for each.
    assert printed.count("accuracy per character") == 4
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *given, "--limit", "0"])
    assert stopped.value.code == 2


@pytest.mark.full
def test_partial_whitening_in_memory(files):
    base, target = jcl.open_base(files / "source"), jcl.open_base(files / "target")
    probes = Probes(tuple(CORPUS), "given")
    transport = jcl.align(base, target, method=Theseus(whitening=0.25), probes=probes)
    assert transport.recipe.settings == {"whitening": 0.25}
    moved = jcl.shift(transport, random_adapter(base))
    plain = jcl.shift(jcl.align(base, target, method="theseus", probes=probes), random_adapter(base))
    for name, factors in moved.adapter.modules.items():
        assert np.isfinite(delta(factors)).all()
        assert np.abs(delta(factors) - delta(plain.adapter.modules[name])).max() > 1e-3
    assert all(0 < row.activation_cosine <= 1 for row in moved.report.rows)


@pytest.mark.parametrize(
    ("method", "power", "wanted"),
    [("theseus", 0.6, "0 (none) to 0.5"), ("copy", 0.1, "method copy has no setting whitening; it has no settings")],
)
def test_unsupported_whitening_is_refused(method, power, wanted):
    with pytest.raises(UsageError) as refused:
        transfer_settings("adapter", "source", "target", "out", method=method, whitening=power)
    assert wanted in str(refused.value)


@pytest.mark.full
def test_shift_runs_the_fit_of_a_fitting_method(files):
    """The transport of such a method has no maps; the fit is that of a transfer."""
    base, target, adapter = jcl.open_base(files / "source"), jcl.open_base(files / "target"), files / "adapter"
    method = jcl.methods.Distill(completions=24, answer_tokens=2, passes=2)
    transport = jcl.align(base, target, method)
    assert transport.groups == ()
    shifted = jcl.shift(transport, adapter, prompts=CORPUS, seed=1)
    moved = jcl.transfer(adapter, base, target, method, prompts=CORPUS, seed=1, effect="never", cache=False)
    assert shifted.report.fit == moved.report.fit is not None
    assert shifted.texts == moved.texts
    for name, factors in moved.adapter.modules.items():
        np.testing.assert_allclose(delta(shifted.adapter.modules[name]), delta(factors), rtol=1e-5)
    assert any(delta(factors).any() for factors in moved.adapter.modules.values())
